"""Attention of each row's last token alone, where all ranks of a sequence hold their own keys and values.

The query is on every rank, so no key or value moves: each rank attends to what it holds, and the partial results, one
token a row, are merged by log-sum-exp. Ring, Ulysses and both together look alike here.
"""

# Shapes: B batch, T tokens on this rank, H query heads, K key/value heads, D head_dim, N ranks.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from ds_ring.attention import sinks
from ds_ring.attention.block import attend
from ds_ring.attention.merge import merge_
from ds_ring.attention.spec import AttentionSpec
from ds_ring.transport.base import Transport


def last_token_attention(
    q_B1HD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    *,
    seen: Sequence[range],
    spec: AttentionSpec,
    transport: Transport,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Attention of one query a row.

    Args:
        q_B1HD: the same on every rank.
        k_BTKD, v_BTKD: this rank's tokens, all heads.
        seen: for each row, which of this rank's tokens the query sees, window and all; may be none.
        transport: the ranks that hold a sequence together.

    Returns:
        out [B, 1, H, D] in q's dtype, the same on every rank.
    """
    out_B1HD = torch.zeros_like(q_B1HD, dtype=torch.float32)
    lse_BH1 = out_B1HD.new_full((q_B1HD.shape[0], q_B1HD.shape[2], 1), -torch.inf)
    unwindowed = replace(spec, window=None)
    for keys, numbers in groupby(range(len(seen)), key=lambda row: seen[row]):
        alike = list(numbers)
        rows = slice(alike[0], alike[-1] + 1)
        if len(keys):
            at = rows, slice(keys.start, keys.stop)
            out_B1HD[rows], lse_BH1[rows] = attend(
                q_B1HD[rows], k_BTKD[at], v_BTKD[at], spec=unwindowed, causal=False, out_dtype=torch.float32
            )
    if transport.size > 1:
        (out_B1HD, *outs), (lse_BH1, *lses) = everyones(out_B1HD, transport), everyones(lse_BH1, transport)
        for out, lse in zip(outs, lses, strict=True):
            merge_(out_B1HD, lse_BH1, out, lse)
    return sinks.apply_(out_B1HD, lse_BH1, sinks_H).to(q_B1HD.dtype)


def everyones(tensor: Tensor, transport: Transport) -> Tensor:
    """[N, ...]: each rank's small ``tensor``. By an all-to-all, as what moves inside layers; ``all_gather`` is for
    results. Measurements leave out the former and keep the latter."""
    return transport.all_to_all(tensor[None].expand(transport.size, *tensor.shape).contiguous())
