"""Queries, keys and values of one block at random, as tests of attention describe them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_ring.attention.reference import reference_attention
from ds_ring.attention.spec import AttentionSpec


@dataclass(frozen=True)
class RandomBlock:
    batch: int = 1
    n_queries: int = 7
    n_keys: int = 9
    kv_heads: int = 1
    group: int = 2
    head_dim: int = 16
    window: int | None = None
    softcap: float | None = None
    seed: int = 0

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(self.head_dim**-0.5, self.window, self.softcap)

    def qkv(self, generator: torch.Generator, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, L, H, D], k and v [B, S, K, D]."""
        heads = self.kv_heads * self.group
        shapes = ((self.n_queries, heads), (self.n_keys, self.kv_heads), (self.n_keys, self.kv_heads))
        q, k, v = (
            (scale * torch.randn(self.batch, length, n, self.head_dim, generator=generator)).to(dtype)
            for length, n in shapes
        )
        return q, k, v


@dataclass(frozen=True)
class SeenBlock(RandomBlock):
    """And how it is seen."""

    causal: bool = True
    q_offset: int = 0
    k_offset: int = 0

    def tensors(self, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv(torch.Generator().manual_seed(self.seed), dtype, scale)


def bottom_right(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """What kernels offer: the last query sees the last key, and only blocks in which every query sees some key."""
    n_queries, n_keys = q.shape[1], k.shape[1]
    assert n_queries > 0
    assert n_keys > 0
    assert not causal or n_queries <= n_keys, "the first queries would see nothing"
    out, lse = reference_attention(q, k, v, spec=AttentionSpec(scale), causal=causal, q_offset=n_keys - n_queries)
    return out.to(q.dtype), lse.float()
