"""Naive attention in fp64: what every fast path is held against. Slow, plain and obviously right."""

# Shapes: B batch, L queries, S keys, H query heads, K key/value heads, D head_dim.
import torch
from torch import Tensor

from ds_ring.attention.spec import AttentionSpec


def reference_attention(
    q_BLHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    *,
    spec: AttentionSpec,
    causal: bool = True,
    q_offset: int = 0,
    k_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention of one block; key j is visible from query i when ``k_offset + j <= q_offset + i``.

    Returns:
        out [B, L, H, D] and lse [B, H, L], both fp64; a row that sees no key gives 0 and -inf.
    """
    groups = q_BLHD.shape[2] // k_BSKD.shape[2]
    q = q_BLHD.double()
    k, v = (t.double().repeat_interleave(groups, dim=2) for t in (k_BSKD, v_BSKD))
    scores_BHLS = torch.einsum("blhd,bshd->bhls", q, k) * spec.scale
    if spec.softcap is not None:
        scores_BHLS = spec.softcap * torch.tanh(scores_BHLS / spec.softcap)
    distance_LS = (torch.arange(q.shape[1])[:, None] + q_offset) - (torch.arange(k.shape[1])[None, :] + k_offset)
    if causal:
        hidden_LS = distance_LS < 0
        if spec.window is not None:
            hidden_LS |= distance_LS >= spec.window
        scores_BHLS = scores_BHLS.masked_fill(hidden_LS.to(q.device), -torch.inf)
    lse_BHL = torch.logsumexp(scores_BHLS, dim=-1)
    weights_BHLS = torch.exp(scores_BHLS - lse_BHL.unsqueeze(-1)).nan_to_num(nan=0.0)
    return torch.einsum("bhls,bshd->blhd", weights_BHLS, v), lse_BHL
