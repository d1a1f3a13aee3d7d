"""One rank's block of attention: (q, k, v) -> (out, lse), by the fastest back-end that can serve it."""

# Shapes: B batch, L queries, S keys, H query heads, K key/value heads, D head_dim.
from __future__ import annotations

import torch
from torch import Tensor

from ds_ring.attention.backends.select import select_backend
from ds_ring.attention.spec import AttentionSpec, BlockSpec


def attend(
    q_BLHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    *,
    spec: AttentionSpec,
    causal: bool = True,
    q_offset: int = 0,
    k_offset: int = 0,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one block.

    Args:
        q_BLHD, k_BSKD, v_BSKD: any strides with a contiguous last dimension; H is a multiple of K (GQA, MQA).
        causal: key j is visible from query i when ``k_offset + j <= q_offset + i`` (and inside the window, where
            there is one); otherwise every key is visible from every query.
        q_offset, k_offset: global positions of the first query and the first key.
        out_dtype: None for q's.
        out: memory for the result, fp32 or q's dtype, which then goes there at once where a kernel can, else by a copy.

    Returns:
        out [B, L, H, D], and lse [B, H, L], fp32, natural logarithm, of the scaled scores. A row that sees no key
        gives out 0 and lse -inf.
    """
    block = BlockSpec(spec, causal, q_offset - k_offset)
    backend = select_backend(q_BLHD, k_BSKD.shape[1], block)
    if out is not None:
        return out, backend.attend_into_(out, q_BLHD, k_BSKD, v_BSKD, block)
    return backend.attend(q_BLHD, k_BSKD, v_BSKD, block, out_dtype or q_BLHD.dtype)


def accumulate_(
    out_BLHD: Tensor,
    lse_BHL: Tensor,
    q_BLHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    *,
    spec: AttentionSpec,
    causal: bool = True,
    q_offset: int = 0,
    k_offset: int = 0,
) -> None:
    """Fold one block into a running result, in place: inside the kernel where it can carry one, else by merging.

    Args:
        out_BLHD, lse_BHL: what ``attend`` gave for other keys, 0 and -inf for none; both fp32, as rounding at every
            hop would let the error grow with the ring. Parts of larger tensors are fine.
        the rest: as ``attend``.
    """
    block = BlockSpec(spec, causal, q_offset - k_offset)
    select_backend(q_BLHD, k_BSKD.shape[1], block).accumulate_(out_BLHD, lse_BHL, q_BLHD, k_BSKD, v_BSKD, block)
