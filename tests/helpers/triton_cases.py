"""Blocks of attention for tests of our Triton kernel, and what its results have to be."""

# Shapes: B batch, L queries, S keys, H query heads, K key/value heads, D head_dim.
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from ds_ring.attention.reference import reference_attention
from ds_ring.kernels import triton_attention
from tests.helpers.random_blocks import SeenBlock


@dataclass(frozen=True)
class Case(SeenBlock):
    n_queries: int = 37
    n_keys: int = 41

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        previous: tuple[Tensor, Tensor] | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        return triton_attention.attention(
            q, k, v, scale=self.spec.scale, causal=self.causal, q_offset=self.q_offset, k_offset=self.k_offset,
            window=self.window, softcap=self.softcap, previous=previous, out_dtype=out_dtype,
        )  # fmt: skip

    def reference(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return reference_attention(
            q, k, v, spec=self.spec, causal=self.causal, q_offset=self.q_offset, k_offset=self.k_offset
        )


cases = st.builds(
    Case,
    batch=st.integers(1, 2),
    n_queries=st.integers(1, 40),
    n_keys=st.integers(1, 70),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    head_dim=st.integers(1, 40),
    causal=st.booleans(),
    q_offset=st.integers(0, 80),
    k_offset=st.integers(0, 80),
    window=st.none() | st.integers(1, 60),
    softcap=st.none() | st.floats(0.5, 50.0),
    seed=st.integers(0, 1000),
)


def assert_is(
    got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], tolerance: float = 3e-6, softcap: float | None = None
) -> None:
    """``got`` has the contract's shape and dtype, no NaN, and the values of ``want``.

    A capped score is a difference of numbers as large as the cap: each is off by up to a few units of rounding of that.
    """
    rounding = 4 * torch.finfo(torch.float32).eps * (softcap or 0.0)
    tolerance += rounding
    (out, lse), (want_out, want_lse) = got, want
    assert out.shape == want_out.shape
    assert out.is_contiguous()
    assert lse.is_contiguous()
    assert lse.dtype == torch.float32
    assert torch.isfinite(out).all()
    assert torch.equal(lse == -math.inf, want_lse == -math.inf)
    torch.testing.assert_close(out.double(), want_out.double(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse.double(), atol=1e-5 + rounding, rtol=2e-6)
