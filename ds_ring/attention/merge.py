"""Merging partial attention results over disjoint sets of keys by their log-sum-exp.

On GPUs in one pass, in Triton (``kernels/merge_kernel.py``), elsewhere the same formula in plain PyTorch.
"""

# Shapes: B batch, L queries, H heads, D head_dim.
from __future__ import annotations

import torch
from torch import Tensor

from ds_ring.kernels.triton_probe import triton_usable

Partial = tuple[Tensor, Tensor]
"""out [B, L, H, D], any float dtype, and lse [B, H, L], fp32, natural logarithm; rows whose lse is -inf are finite."""


def merge_(out_BLHD: Tensor, lse_BHL: Tensor, block_out_BLHD: Tensor, block_lse_BHL: Tensor) -> None:
    """Fold a block's result into the running one, in place; as ``merge_into``.

    Args:
        out_BLHD: running output, fp32: rounding it at every hop would let the error grow with the ring.
        lse_BHL: running log-sum-exp.
        block_out_BLHD, block_lse_BHL: the block's.
    """
    assert out_BLHD.dtype == torch.float32
    merge_into(out_BLHD, lse_BHL, (out_BLHD, lse_BHL), (block_out_BLHD, block_lse_BHL))


def merge_into(out_BLHD: Tensor, lse_BHL: Tensor, first: Partial, second: Partial) -> None:
    """Write what two partial results are together.

    out = (e^lse1 out1 + e^lse2 out2) / (e^lse1 + e^lse2), lse = log(e^lse1 + e^lse2), computed in fp32 so that it is
    total: a side whose lse is -inf (no visible key) drops out, both -inf stay 0 and -inf, and a side at +inf wins;
    never NaN. (The merge of FlashAttention's split-K, arXiv 2205.14135, section 3.1.)

    Args:
        out_BLHD, lse_BHL: where to, any strides; may be the first's.
    """
    assert lse_BHL.dtype == first[1].dtype == second[1].dtype == torch.float32
    rows_lie_whole = all(t.stride(3) == 1 for t in (out_BLHD, first[0], second[0]))
    if rows_lie_whole and _kernel_runs_on(second[0]):
        from ds_ring.kernels import merge_kernel

        merge_kernel.merge(out_BLHD, lse_BHL, *first, *second)
    else:
        merge_plainly(out_BLHD, lse_BHL, first, second)


def _kernel_runs_on(tensor: Tensor) -> bool:
    return tensor.is_cuda and triton_usable("merging", self_test, tensor.device, tensor.dtype)


def merge_plainly(out_BLHD: Tensor, lse_BHL: Tensor, first: Partial, second: Partial) -> None:
    """As ``merge_into``, in plain PyTorch."""
    weight_BLH1, total_BHL = _weight(first[1], second[1])
    if out_BLHD.dtype == torch.float32:
        torch.lerp(first[0].float(), second[0].float(), weight_BLH1, out=out_BLHD)
    else:  # fp32 copies would take several times the result's memory
        torch.mul(first[0], 1 - weight_BLH1, out=out_BLHD).addcmul_(second[0], weight_BLH1)
    lse_BHL.copy_(total_BHL)


def _weight(lse_BHL: Tensor, block_lse_BHL: Tensor) -> tuple[Tensor, Tensor]:
    """The second's share of the merged output, [B, L, H, 1], and the merged log-sum-exp."""
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


def self_test(device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps the kernel from giving the plain formula's result on small examples; None: nothing."""
    from ds_ring.kernels import merge_kernel

    generator = torch.Generator().manual_seed(0)
    (a, b), lses = (torch.randn(2, *size, generator=generator).to(device) for size in ((1, 5, 3, 24), (1, 3, 5)))
    lses[0, ..., 0] = lses[1, ..., :2] = -torch.inf
    for to in dict.fromkeys((torch.float32, dtype)):
        first, second = (a.to(to), lses[0]), (b.to(dtype), lses[1])
        got, want = ((torch.empty_like(first[0]), torch.empty_like(first[1])) for _ in range(2))
        merge_plainly(*want, first, second)
        merge_kernel.merge(*got, *first, *second)
        tolerance = 1e-5 if to == torch.float32 else 2e-2
        for g, w in zip(got, want, strict=True):
            if not torch.allclose(g, w, atol=tolerance, rtol=tolerance):
                return f"its self-test fails on {device}, into {to}"
    return None
