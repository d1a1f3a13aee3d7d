"""Merging partial attention results over disjoint sets of keys by their log-sum-exp."""

# Shapes: B batch, L queries, H heads, D head_dim.
import torch
from torch import Tensor


def merge_(out_BLHD: Tensor, lse_BHL: Tensor, block_out_BLHD: Tensor, block_lse_BHL: Tensor) -> None:
    """Fold a block's result into the running one, in place.

    out = (e^lse out + e^block_lse block_out) / (e^lse + e^block_lse), lse = log(e^lse + e^block_lse), computed so
    that it is total: a side whose lse is -inf (no visible key) drops out, both -inf stay 0 and -inf, and a side at
    +inf wins; never NaN. (The merge of FlashAttention's split-K, arXiv 2205.14135, section 3.1.)

    Args:
        out_BLHD: running output, fp32: rounding it at every hop would let the error grow with the ring.
        lse_BHL: running log-sum-exp, fp32, natural logarithm.
        block_out_BLHD: the block's output, any float dtype; rows whose lse is -inf must be finite.
        block_lse_BHL: the block's log-sum-exp, fp32.
    """
    assert out_BLHD.dtype == lse_BHL.dtype == block_lse_BHL.dtype == torch.float32
    weight_BLH1, total_BHL = block_weight(lse_BHL, block_lse_BHL)
    out_BLHD.lerp_(block_out_BLHD.to(out_BLHD.dtype), weight_BLH1)
    lse_BHL.copy_(total_BHL)


def block_weight(lse_BHL: Tensor, block_lse_BHL: Tensor) -> tuple[Tensor, Tensor]:
    """The block's share of the merged output, [B, L, H, 1], and the merged log-sum-exp."""
    total = torch.logaddexp(lse_BHL, block_lse_BHL)
    # e^(lse - total) is inf - inf where total is infinite: nothing seen on both sides (keep what is there), or an
    # overflowed side (takes all).
    weight = torch.where(
        torch.isinf(total), (block_lse_BHL == torch.inf).to(total.dtype), torch.exp(block_lse_BHL - total)
    )
    return weight.transpose(1, 2).unsqueeze(-1), total


def merge_all(out_RBLHD: Tensor, lse_RBHL: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of R partial results at once, fp32; the same rules as ``merge_``, apart from lse = +inf."""
    lse_BHL = torch.logsumexp(lse_RBHL, dim=0)
    weight_RBHL = torch.exp(lse_RBHL - torch.where(lse_BHL == -torch.inf, 0.0, lse_BHL))
    return torch.einsum("rbhl,rblhd->blhd", weight_RBHL, out_RBLHD), lse_BHL
