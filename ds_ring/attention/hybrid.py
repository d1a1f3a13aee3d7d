"""Sequence-parallel attention in two dimensions: Ulysses around a ring. Either of them may be of degree 1."""

# Shapes: B batch, T tokens on this rank, H query heads, K key/value heads, D head_dim.
from functools import partial

from torch import Tensor

from ds_ring.attention.qkv_buffers import own_sinks
from ds_ring.attention.ring import ring_attention
from ds_ring.attention.spec import AttentionSpec
from ds_ring.attention.ulysses import ulysses_attention
from ds_ring.config import RingVariant
from ds_ring.parallel.layout import SequenceLayout
from ds_ring.transport.base import Transport


def sequence_parallel_attention(
    q_BTHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    *,
    layout: SequenceLayout,
    spec: AttentionSpec,
    ring: Transport,
    ulysses: Transport,
    sinks_H: Tensor | None = None,
    variant: RingVariant = "auto",
    gather_limit_bytes: int = 2 << 30,
) -> Tensor:
    """Causal attention of this rank's tokens (``layout.positions``) against the whole sequence.

    The all-to-all makes whole ring slices with a part of the heads. The ring then runs on those; the rings of different
    heads run in parallel.

    Args:
        sinks_H: attention sinks of all heads, the same on every rank.
        variant, gather_limit_bytes: as for ``ring_attention``.

    Returns:
        out [B, T, H, D] in q's dtype.
    """
    slice_attention = partial(
        ring_attention,
        layout=layout, spec=spec, transport=ring, sinks_H=own_sinks(sinks_H, ulysses),
        variant=variant, gather_limit_bytes=gather_limit_bytes,
    )  # fmt: skip
    return ulysses_attention(q_BTHD, k_BTKD, v_BTKD, transport=ulysses, slice_attention=slice_attention)
