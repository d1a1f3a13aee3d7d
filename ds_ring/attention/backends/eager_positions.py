"""Attention by positions in plain PyTorch: any device, any head size, windows and softcap; fp32 accumulation."""

# Shapes: B batch, L queries, S keys, H query heads, K key/value heads, G = H / K, D head_dim.
import torch
from torch import Tensor

from ds_ring.attention.backends import eager
from ds_ring.attention.merge import merge_
from ds_ring.attention.spec import AttentionSpec

MAX_KEYS = 4096
"""Keys that are taken, and cast, at a time: a whole cache in fp32 may not fit."""


def attention(
    q_BLHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    *,
    q_positions_BL: Tensor,
    k_positions_BS: Tensor,
    spec: AttentionSpec,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Contract as ``positions.attend_positions``. By groups of queries and of keys, ``eager.SCORES_LIMIT`` scores at a
    time or one query against a few keys."""
    batch, n_queries, heads, _ = q_BLHD.shape
    n_keys = k_BSKD.shape[1]
    out_BLHD = torch.zeros_like(q_BLHD, dtype=torch.float32, memory_format=torch.contiguous_format)
    lse_BHL = q_BLHD.new_full((batch, heads, n_queries), -torch.inf, dtype=torch.float32)
    pairs = max(1, eager.SCORES_LIMIT // max(1, batch * heads))
    keys = min(MAX_KEYS, max(1, n_keys), max(64, pairs))
    queries = max(1, pairs // keys)
    for start in range(0, n_queries, queries):
        rows = slice(start, start + queries)
        for first in range(0, n_keys, keys):
            some = slice(first, first + keys)
            visible_BLS = _visible(q_positions_BL[:, rows], k_positions_BS[:, some], spec.window)
            block = _block(q_BLHD[:, rows], k_BSKD[:, some], v_BSKD[:, some], visible_BLS, spec)
            merge_(out_BLHD[:, rows], lse_BHL[:, :, rows], *block)
    return out_BLHD.to(out_dtype or q_BLHD.dtype), lse_BHL


def _visible(q_positions_BL: Tensor, k_positions_BS: Tensor, window: int | None) -> Tensor:
    distance_BLS = q_positions_BL[:, :, None] - k_positions_BS[:, None, :]
    visible_BLS = distance_BLS >= 0
    return visible_BLS if window is None else visible_BLS & (distance_BLS < window)


def _block(
    q_BLHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, visible_BLS: Tensor, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """(out, lse), both fp32."""
    batch, n_queries, heads, head_dim = q_BLHD.shape
    n_keys, kv_heads = k_BSKD.shape[1:3]
    groups = heads // kv_heads
    # Query heads that share a key/value head become more rows of one matrix product: no key is repeated in memory.
    q_BKGLD = q_BLHD.float().transpose(1, 2).reshape(batch, kv_heads, groups, n_queries, head_dim) * spec.scale
    k_BKDS, v_BKSD = k_BSKD.float().permute(0, 2, 3, 1), v_BSKD.float().transpose(1, 2)
    # An empty slot may hold NaN, which a weight of 0 would not remove.
    v_BKSD = v_BKSD.masked_fill(~visible_BLS.any(1)[:, None, :, None], 0.0)
    scores = (q_BKGLD.flatten(2, 3) @ k_BKDS).view(batch, kv_heads, groups, n_queries, n_keys)
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores.masked_fill_(~visible_BLS[:, None, None], -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    # A row that sees nothing has lse -inf; shifting it by 0 instead keeps its weights at exp(-inf) = 0.
    weights = torch.exp_(scores.sub_(torch.where(torch.isinf(lse), 0.0, lse).unsqueeze(-1)))
    out = (weights.flatten(2, 3) @ v_BKSD).view(batch, heads, n_queries, head_dim)
    return out.transpose(1, 2), lse.view(batch, heads, n_queries)
