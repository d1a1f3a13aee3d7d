"""Block attention in plain PyTorch: any device, any head size, windows and softcap; fp32 accumulation."""

# Shapes: B batch, L queries, S keys, K key/value heads, G query heads per key/value head, D head_dim.
import torch
from torch import Tensor

from ds_ring.attention.spec import AttentionSpec

SCORES_LIMIT = 1 << 20
"""Scores held at a time (fp32 elements), few enough to stay in cache; longer blocks go by groups of queries, which also
lets causal blocks leave out the keys that no query of the group sees."""


def attention(
    q_BLHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    *,
    spec: AttentionSpec,
    causal: bool,
    shift: int,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of one block; with ``causal``, key j is visible from query i when ``j <= i + shift``.

    Contract as ``Backend.attend``.
    """
    batch, n_queries, heads, _ = q_BLHD.shape
    n_keys = k_BSKD.shape[1]
    out_BLHD = torch.empty_like(q_BLHD, dtype=out_dtype, memory_format=torch.contiguous_format)
    lse_BHL = torch.empty(batch, heads, n_queries, dtype=torch.float32, device=q_BLHD.device)
    k_BKDS, v_BKSD = k_BSKD.float().permute(0, 2, 3, 1), v_BSKD.float().transpose(1, 2)
    step = max(1, SCORES_LIMIT // max(1, batch * heads * n_keys))
    for start in range(0, n_queries, step):
        rows = slice(start, min(start + step, n_queries))
        seen = min(n_keys, max(0, rows.stop + shift)) if causal else n_keys
        out, lse = _rows(q_BLHD[:, rows], k_BKDS[..., :seen], v_BKSD[:, :, :seen], spec, causal, shift + start)
        out_BLHD[:, rows], lse_BHL[:, :, rows] = out, lse
    return out_BLHD, lse_BHL


def _rows(
    q_BLHD: Tensor, k_BKDS: Tensor, v_BKSD: Tensor, spec: AttentionSpec, causal: bool, shift: int
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a group of queries, both fp32."""
    batch, n_queries, heads, head_dim = q_BLHD.shape
    kv_heads, n_keys = k_BKDS.shape[1], k_BKDS.shape[3]
    if n_keys == 0:
        lse = q_BLHD.new_full((batch, heads, n_queries), -torch.inf, dtype=torch.float32)
        return torch.zeros_like(q_BLHD, dtype=torch.float32), lse
    # Query heads that share a key/value head become more rows of one matrix product: no key is repeated in memory.
    q_BKGLD = q_BLHD.float().transpose(1, 2).reshape(batch, kv_heads, -1, n_queries, head_dim) * spec.scale
    scores = (q_BKGLD.flatten(2, 3) @ k_BKDS).view(batch, kv_heads, -1, n_queries, n_keys)
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if causal:
        distance_LS = torch.arange(n_queries, device=q_BLHD.device)[:, None] + shift
        distance_LS = distance_LS - torch.arange(n_keys, device=q_BLHD.device)[None, :]
        hidden_LS = distance_LS < 0
        if spec.window is not None:
            hidden_LS |= distance_LS >= spec.window
        scores = scores.masked_fill_(hidden_LS, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    # A row that sees nothing has lse -inf; shifting it by 0 instead keeps its weights at exp(-inf) = 0.
    weights = torch.exp_(scores.sub_(torch.where(torch.isinf(lse), 0.0, lse).unsqueeze(-1)))
    out = (weights.flatten(2, 3) @ v_BKSD).view(batch, heads, n_queries, head_dim)
    return out.transpose(1, 2), lse.view(batch, heads, n_queries)
