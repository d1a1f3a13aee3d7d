"""One rank's block of attention: (q, k, v) -> (out, lse), by the fastest back-end that can serve it."""

# Shapes: B batch, L queries, S keys, H query heads, K key/value heads, D head_dim.
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from ds_ring.attention import aten, plain
from ds_ring.attention.spec import AttentionSpec
from ds_ring.kernels import attention512
from ds_ring.kernels.build import log, unavailable


class Backend(Protocol):
    """A block whose causal mask is aligned to the last query and the last key: query i sees keys 0 .. S - L + i."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]: ...
    def __hash__(self) -> int: ...


def attend(
    q_BLHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    *,
    spec: AttentionSpec,
    causal: bool = True,
    q_offset: int = 0,
    k_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention of one block.

    Args:
        q_BLHD, k_BSKD, v_BSKD: any strides with a contiguous last dimension; H is a multiple of K (GQA, MQA).
        causal: key j is visible from query i when ``k_offset + j <= q_offset + i`` (and inside the window, where
            there is one); otherwise every key is visible from every query.
        q_offset, k_offset: global positions of the first query and the first key.

    Returns:
        out [B, L, H, D] in q's dtype, and lse [B, H, L], fp32, natural logarithm, of the scaled scores. A row that
        sees no key gives out 0 and lse -inf.
    """
    backend = choose_backend(q_BLHD, spec)
    if backend is None:
        return plain.attention(q_BLHD, k_BSKD, v_BSKD, spec=spec, causal=causal, shift=q_offset - k_offset)
    if not causal:
        return backend(q_BLHD, k_BSKD, v_BSKD, scale=spec.scale, causal=False)
    return _causal(backend, q_BLHD, k_BSKD, v_BSKD, spec.scale, q_offset - k_offset)


def choose_backend(q_BLHD: Tensor, spec: AttentionSpec) -> Backend | None:
    """The back-end for this device, dtype and head size; None is the plain path."""
    head_dim = q_BLHD.shape[-1]
    if not q_BLHD.is_cuda or not spec.plain or q_BLHD.dtype == torch.float32 or head_dim % 8:
        return None
    backend = _fastest(q_BLHD.device, head_dim)
    check_convention(backend, q_BLHD.device, q_BLHD.dtype, head_dim)
    return backend


@cache
def _fastest(device: torch.device, head_dim: int) -> Backend:
    if head_dim <= aten.FLASH_MAX_HEAD_DIM:
        return aten.flash
    if head_dim == attention512.HEAD_DIM:
        reason = unavailable(device)
        if reason is None:
            return attention512.block
        log.warning("attention at head_dim 512: %s; taking PyTorch's memory-efficient kernel instead", reason)
    return aten.memory_efficient


@cache
def check_convention(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Hold a back-end against the plain path once, on a small block, before its results are merged with others'.

    Libraries differ in the logarithm's base, in the alignment of the causal mask and in the shape of the lse; a
    difference there would not crash but give wrong numbers.
    """
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, length, 2, head_dim, generator=generator, device=device, dtype=dtype) for length in (33, 65, 65)
    )
    spec = AttentionSpec(scale=head_dim**-0.5)
    out, lse = backend(q, k, v, scale=spec.scale, causal=True)
    want_out, want_lse = plain.attention(q.float(), k.float(), v.float(), spec=spec, causal=True, shift=32)
    if (
        (lse.shape, lse.dtype) != (want_lse.shape, want_lse.dtype)
        or not torch.allclose(lse, want_lse, atol=2e-2, rtol=1e-3)
        or not torch.allclose(out.float(), want_out, atol=2e-2, rtol=2e-2)
    ):
        raise RuntimeError(
            f"attention back-end {getattr(backend, '__name__', backend)} fails its self-test on {device} with {dtype}, "
            f"head_dim {head_dim}: its lse or its mask follows another convention"
        )


def _causal(
    backend: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor, scale: float, shift: int
) -> tuple[Tensor, Tensor]:
    """Reduce any offset to the one alignment that back-ends offer (last query on last key)."""
    n_queries, n_keys = q.shape[1], k.shape[1]
    blind = min(n_queries, max(0, -shift))  # leading queries that see nothing
    sighted = min(n_queries, max(blind, n_keys - shift))  # from here on, queries see every key
    if blind == 0 and sighted == n_queries:
        return backend(q, k[:, : n_queries + shift], v[:, : n_queries + shift], scale=scale, causal=True)
    out, lse = torch.zeros_like(q), q.new_full((q.shape[0], q.shape[2], n_queries), -torch.inf, dtype=torch.float32)
    if sighted > blind:
        seen = sighted + shift
        out[:, blind:sighted], lse[:, :, blind:sighted] = backend(
            q[:, blind:sighted], k[:, :seen], v[:, :seen], scale=scale, causal=True
        )
    if n_queries > sighted:
        out[:, sighted:], lse[:, :, sighted:] = backend(q[:, sighted:], k, v, scale=scale, causal=False)
    return out, lse
