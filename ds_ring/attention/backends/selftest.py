"""Holding a back-end or the decode kernel against the plain path on small blocks, before its results are merged with
others'."""

# Shapes: B batch, L queries, S keys, H query heads, K key/value heads, D head_dim.
from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ds_ring.attention.backends import eager, eager_positions
from ds_ring.attention.backends.base import Backend
from ds_ring.attention.merge import Partial
from ds_ring.attention.spec import AttentionSpec, BlockSpec

QUERIES, KEYS, HEADS, KV_HEADS = 33, 65, 4, 2
WINDOW, SOFTCAP = 20, 2.0
SLOTS, LIVE, EMPTY = 700, 650, 2**30
"""Of a cache: enough slots for several splits, the last of them empty."""


class ByPositions(Protocol):
    """As ``kernels.decode.attention``."""

    def __call__(
        self,
        q_BLHD: Tensor,
        k_BSKD: Tensor,
        v_BSKD: Tensor,
        *,
        q_positions_BL: Tensor,
        k_positions_BS: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Partial: ...


def self_test(
    backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int, windowed: bool, capped: bool
) -> None:
    """A full block, a square causal one, one with more keys than queries, and one folded into a running result.

    Libraries differ in the logarithm's base, in the alignment of the causal mask, in the order of grouped heads and in
    the shape of the lse; a difference there would not crash but give wrong numbers.

    Raises:
        RuntimeError: the back-end's results are not the plain path's.
    """
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, length, heads, head_dim, generator=generator, device=device, dtype=dtype)
        for length, heads in ((QUERIES, HEADS), (KEYS, KV_HEADS), (KEYS, KV_HEADS))
    )
    spec = AttentionSpec(head_dim**-0.5, WINDOW if windowed else None, SOFTCAP if capped else None)
    ahead = KEYS - QUERIES

    def want(block: BlockSpec, keys: slice) -> Partial:
        single = q.float(), k[:, keys].float(), v[:, keys].float()
        return eager.attention(*single, spec=spec, causal=block.causal, shift=block.shift)

    def check(got: Partial, wanted: Partial, what: str) -> None:
        (out, lse), (want_out, want_lse) = got, wanted
        if (
            (out.shape, lse.shape, lse.dtype) != (want_out.shape, want_lse.shape, want_lse.dtype)
            or not torch.allclose(lse, want_lse, atol=2e-2, rtol=1e-3)
            or not torch.allclose(out.float(), want_out, atol=2e-2, rtol=2e-2)
        ):
            raise RuntimeError(
                f"attention back-end {backend.name} fails its self-test on {device} with {dtype}, head_dim {head_dim}: "
                f"in {what} its lse or its mask follows another convention"
            )

    everything, behind = slice(0, KEYS), slice(ahead, KEYS)
    for block, keys, what in (
        (BlockSpec(spec, False, 0), everything, "a full block"),
        (BlockSpec(spec, True, 0), behind, "a square causal block"),
        (BlockSpec(spec, True, ahead), everything, "a causal block with more keys than queries"),
    ):
        check(backend.attend(q, k[:, keys], v[:, keys], block, dtype), want(block, keys), what)

    first = BlockSpec(spec, True, ahead)
    out, lse = backend.attend(q, k[:, :ahead], v[:, :ahead], first, torch.float32)
    backend.accumulate_(out, lse, q, k[:, ahead:], v[:, ahead:], BlockSpec(spec, True, 0))
    check((out, lse), want(first, everything), "a block folded into a running result")


def self_test_positions(
    kernel: ByPositions, device: torch.device, dtype: torch.dtype, head_dim: int, windowed: bool, capped: bool
) -> None:
    """One query and many against a cache in no order, two rows of different lengths, with NaN in the empty slots.

    Raises:
        RuntimeError: the kernel's results are not the plain path's.
    """
    generator = torch.Generator(device).manual_seed(0)
    spec = AttentionSpec(head_dim**-0.5, WINDOW if windowed else None, SOFTCAP if capped else None)
    k, v = torch.randn(2, 2, SLOTS, KV_HEADS, head_dim, generator=generator, device=device, dtype=dtype)
    places = torch.randperm(LIVE, generator=generator, device=device, dtype=torch.int32)
    k_positions = torch.full((2, SLOTS), EMPTY, dtype=torch.int32, device=device)
    k_positions[0, :LIVE] = torch.arange(LIVE, device=device)
    k_positions[1, :LIVE] = torch.where(places < QUERIES, EMPTY, places)
    for cached in (k, v):
        cached.masked_fill_((k_positions == EMPTY)[:, :, None, None], torch.nan)
    for n_queries in (1, QUERIES):
        q = torch.randn(2, n_queries, HEADS, head_dim, generator=generator, device=device, dtype=dtype)
        q_positions = torch.arange(LIVE - n_queries, LIVE, device=device, dtype=torch.int32).expand(2, -1)
        out, lse = kernel(
            q, k, v, q_positions_BL=q_positions, k_positions_BS=k_positions, scale=spec.scale, window=spec.window,
            softcap=spec.softcap,
        )  # fmt: skip
        want_out, want_lse = eager_positions.attention(
            q.float(), k.float(), v.float(), q_positions_BL=q_positions, k_positions_BS=k_positions, spec=spec
        )
        if not torch.allclose(lse, want_lse, atol=2e-2, rtol=1e-3) or not torch.allclose(
            out.float(), want_out, atol=2e-2, rtol=2e-2
        ):
            raise RuntimeError(
                f"the decode kernel fails its self-test on {device} with {dtype}, head_dim {head_dim}: {n_queries} "
                f"queries against a cache give other results than plain PyTorch"
            )
