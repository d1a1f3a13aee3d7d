"""Queries against a cache for tests of attention by positions, and what the results have to be, in fp64."""

# Shapes: B batch, L queries, S keys, H query heads, K key/value heads, D head_dim.
from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from ds_ring.attention.backends import eager_positions
from ds_ring.attention.backends.positions import EMPTY
from ds_ring.attention.reference import reference_attention
from ds_ring.kernels import decode
from tests.helpers.random_blocks import RandomBlock

NAN = float("nan")


@dataclass(frozen=True)
class Case(RandomBlock):
    """Queries at the last positions before ``behind`` more keys, against keys at positions in any order."""

    n_queries: int = 1
    n_keys: int = 71
    behind: int = 0
    empty: float = 0.0
    ordered: bool = False

    def tensors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the positions; empty slots hold NaN."""
        generator = torch.Generator().manual_seed(self.seed)
        q, k, v = self.qkv(generator, dtype)
        first = self.n_keys - self.n_queries - self.behind
        q_positions = torch.arange(first, first + self.n_queries, dtype=torch.int32).expand(self.batch, -1)
        orders = [torch.randperm(self.n_keys, generator=generator) for _ in range(self.batch)]
        k_positions = torch.stack([order.sort().values if self.ordered else order for order in orders]).int()
        gone = torch.rand(k_positions.shape, generator=generator) < self.empty
        k_positions[gone] = EMPTY
        k[gone], v[gone] = NAN, NAN
        return q, k, v, q_positions, k_positions

    def attend(self, path: str, q, k, v, q_positions, k_positions, out_dtype=None) -> tuple[Tensor, Tensor]:
        where = {"q_positions_BL": q_positions, "k_positions_BS": k_positions}
        if path == "eager":
            return eager_positions.attention(q, k, v, **where, spec=self.spec, out_dtype=out_dtype)
        return decode.attention(
            q, k, v, **where, scale=self.spec.scale, window=self.window, softcap=self.softcap, out_dtype=out_dtype
        )


def reference(case: Case, q, k, v, q_positions, k_positions) -> tuple[Tensor, Tensor]:
    """fp64, a query at a time, over the keys that it sees and no others."""
    out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            at = int(q_positions[b, i])
            seen = [j for j, p in enumerate(k_positions[b].tolist()) if p <= at and p > at - (case.window or EMPTY)]
            if case.window == 0 or not seen:
                continue
            one = q[b : b + 1, i : i + 1], k[b : b + 1, seen], v[b : b + 1, seen]
            spec = replace(case.spec, window=None)
            part, part_lse = reference_attention(*one, spec=spec, causal=False)
            out[b, i], lse[b, i] = part[0, 0], part_lse[0, :, 0]
    return out, lse.transpose(1, 2)


def assert_is(got, want, tolerance: float = 3e-6, softcap: float | None = None) -> None:
    """A capped score is a difference of numbers as large as the cap, each off by a few units of rounding of that."""
    rounding = 4 * torch.finfo(torch.float32).eps * (softcap or 0.0)
    (out, lse), (want_out, want_lse) = got, want
    assert out.shape == want_out.shape
    assert lse.dtype == torch.float32
    assert torch.isfinite(out).all()
    assert torch.equal(lse == -math.inf, want_lse == -math.inf)
    tolerance += rounding
    torch.testing.assert_close(out.double(), want_out.double(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse.double(), atol=1e-5 + rounding, rtol=2e-6)


cases = st.builds(
    Case,
    batch=st.integers(1, 2),
    n_queries=st.integers(1, 20),
    n_keys=st.integers(1, 130),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    head_dim=st.integers(1, 40),
    behind=st.integers(-5, 60),
    empty=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    ordered=st.booleans(),
    window=st.none() | st.integers(0, 60),
    softcap=st.none() | st.floats(0.5, 50.0),
    seed=st.integers(0, 1000),
)
