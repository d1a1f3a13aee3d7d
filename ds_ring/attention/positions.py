"""Attention where every query and every key has a position of its own: what a cache of unequal rows asks for."""

# Shapes: B batch, L queries, S keys, H query heads, K key/value heads, D head_dim.
from __future__ import annotations

import torch
from torch import Tensor

from ds_ring.attention.plain import SCORES_LIMIT
from ds_ring.attention.spec import AttentionSpec

EMPTY = 2**30
"""Position of a key that no query sees: an empty slot, or padding."""
BLIND = -1
"""Position of a query that sees no key: padding."""


def attend_positions(
    q_BLHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    *,
    q_positions_BL: Tensor,
    k_positions_BS: Tensor,
    spec: AttentionSpec,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one block by positions, in any order, other ones in every row.

    Args:
        q_BLHD, k_BSKD, v_BSKD: any strides with a contiguous last dimension; H is a multiple of K; S may be 0. Hidden
            keys and values must be finite all the same.
        q_positions_BL, k_positions_BS: int32. Key j of row b is visible from query i when its position is at most the
            query's, and more than the query's less the window, where there is one.
        out_dtype: None for q's.

    Returns:
        out [B, L, H, D], and lse [B, H, L], fp32, natural logarithm. A row that sees no key gives 0 and -inf.
    """
    batch, n_queries, heads, _ = q_BLHD.shape
    out_BLHD = torch.empty_like(q_BLHD, dtype=out_dtype or q_BLHD.dtype, memory_format=torch.contiguous_format)
    lse_BHL = q_BLHD.new_empty((batch, heads, n_queries), dtype=torch.float32)
    k_BKDS, v_BKSD = k_BSKD.float().permute(0, 2, 3, 1), v_BSKD.float().transpose(1, 2)
    step = max(1, SCORES_LIMIT // max(1, batch * heads * k_BSKD.shape[1]))
    for start in range(0, n_queries, step):
        rows = slice(start, min(start + step, n_queries))
        hidden_BLS = k_positions_BS[:, None] > q_positions_BL[:, rows, None]
        if spec.window is not None:
            hidden_BLS |= k_positions_BS[:, None] <= q_positions_BL[:, rows, None] - spec.window
        out_BLHD[:, rows], lse_BHL[:, :, rows] = _rows(q_BLHD[:, rows], k_BKDS, v_BKSD, hidden_BLS, spec)
    return out_BLHD, lse_BHL


def _rows(
    q_BLHD: Tensor, k_BKDS: Tensor, v_BKSD: Tensor, hidden_BLS: Tensor, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a group of queries, both fp32."""
    batch, n_queries, heads, head_dim = q_BLHD.shape
    kv_heads, n_keys = k_BKDS.shape[1], k_BKDS.shape[3]
    q_BKGLD = q_BLHD.float().transpose(1, 2).reshape(batch, kv_heads, -1, n_queries, head_dim) * spec.scale
    scores = (q_BKGLD.flatten(2, 3) @ k_BKDS).view(batch, kv_heads, heads // kv_heads, n_queries, n_keys)
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores.masked_fill_(hidden_BLS[:, None, None], -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp_(scores.sub_(torch.where(torch.isinf(lse), 0.0, lse).unsqueeze(-1)))
    out = (weights.flatten(2, 3) @ v_BKSD).view(batch, heads, n_queries, head_dim)
    return out.transpose(1, 2), lse.view(batch, heads, n_queries)
