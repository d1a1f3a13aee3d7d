"""Attention sinks: in every softmax a learnt score a head, which takes weight and gives no value (GPT-OSS)."""

# Shapes: B batch, L queries, H query heads, D head_dim.
import torch
from torch import Tensor


def apply_(out_BLHD: Tensor, lse_BHL: Tensor, sinks_H: Tensor | None) -> Tensor:
    """Turn attention without sinks into attention with them, in place; returns ``out_BLHD``.

    A sink adds e^sink to the softmax's denominator e^lse and nothing to its numerator, so that
    ``out *= e^lse / (e^lse + e^sink)``. That holds for whole results only: merge all partial ones first, then apply
    the sinks once. (Streaming attention sinks, arXiv 2309.17453, as GPT-OSS learns them, arXiv 2508.10925.)

    Args:
        out_BLHD: any float dtype.
        lse_BHL: fp32, natural logarithm. A row that saw no key (-inf) stays 0, whatever the sink.
        sinks_H: any float dtype, one a query head, on the scale of the scaled scores; None where there are none.
    """
    if sinks_H is None:
        return out_BLHD
    weight_BHL = torch.sigmoid(lse_BHL - sinks_H.float()[:, None]).masked_fill_(lse_BHL == -torch.inf, 0.0)
    return out_BLHD.mul_(weight_BHL.transpose(1, 2).unsqueeze(-1))
