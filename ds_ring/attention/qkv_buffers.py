"""Where one layer's queries, keys and values belong: written there by whoever makes them, nothing copies them again."""

# Shapes: B batch, T tokens on this rank, H query heads, K key/value heads, D head_dim.
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from ds_ring.attention.kv_exchange import KVExchange
from ds_ring.attention.qkv_layout import QKVLayout, Shares
from ds_ring.attention.ring import attend_exchange, ring_attention
from ds_ring.attention.spec import AttentionSpec
from ds_ring.attention.ulysses import HeadSlice, ProjectionTrade, Trade, shares_of
from ds_ring.config import RingVariant
from ds_ring.parallel.layout import SequenceLayout
from ds_ring.transport.base import Transport
from ds_ring.transport.shared import ViewOf

ALL = slice(None)


class QKVBuffers(ABC):
    """The order of use: write ``k`` and ``v``, ``start``, write ``q`` (earlier does no harm), ``attend``."""

    k: list[HeadSlice]
    v: list[HeadSlice]
    kv_BTKD: tuple[Tensor, Tensor] | None = None
    """Keys and values whole, where they lie together."""
    memory: Tensor | None = None
    """What is to be written as a whole, where ``place`` was told how k and v lie in it."""
    takes_q = False
    """Whether queries may stay in the memory they were made in."""

    @property
    @abstractmethod
    def q(self) -> list[HeadSlice]: ...

    def take_q(self, q_BTHD: Tensor) -> None:
        """In place of writing to ``q``; only where that is so."""
        raise NotImplementedError

    @abstractmethod
    def start(self) -> None:
        """Keys and values are written: whatever can travel already does from here on."""

    @abstractmethod
    def attend(self, spec: AttentionSpec, sinks_H: Tensor | None) -> Tensor:
        """out [B, T, H, D]; to be called once."""


class RingBuffers(QKVBuffers):
    """Keys and values in the tensor that peers read, queries in memory of this rank's own."""

    takes_q = True

    def __init__(self, exchange: KVExchange, num_heads: int) -> None:
        self._travelling, self._num_heads = exchange, num_heads
        k_BTKD, v_BTKD = exchange.own_2BLKD
        self.kv_BTKD, self.memory = (k_BTKD, v_BTKD), exchange.memory
        self.k, self.v = [(ALL, k_BTKD)], [(ALL, v_BTKD)]
        self._q_BTHD: Tensor | None = None

    @property
    def q(self) -> list[HeadSlice]:
        if self._q_BTHD is None:
            _, batch, local, _, head_dim = self._travelling.own_2BLKD.shape
            self._q_BTHD = self._travelling.own_2BLKD.new_empty((batch, local, self._num_heads, head_dim))
        return [(ALL, self._q_BTHD)]

    def take_q(self, q_BTHD: Tensor) -> None:
        self._q_BTHD = q_BTHD

    def start(self) -> None:
        self._travelling.start()

    def attend(self, spec: AttentionSpec, sinks_H: Tensor | None) -> Tensor:
        assert self._q_BTHD is not None
        return attend_exchange(self._q_BTHD, self._travelling, spec, sinks_H)


class UlyssesBuffers(QKVBuffers):
    """All three where the all-to-all sends them from: heads for each rank apart, or a projection as it is. With a ring
    behind it, K and V are copied once more on arrival."""

    def __init__(self, trade: Trade | ProjectionTrade, ulysses: Transport, ring: Callable[..., Tensor]) -> None:
        self._trade, self._ulysses, self._ring = trade, ulysses, ring
        self.k, self.v, self.memory = trade.k, trade.v, trade.memory
        self.takes_q = trade.memory is not None

    @property
    def q(self) -> list[HeadSlice]:
        return self._trade.q

    def take_q(self, q_BTHD: Tensor) -> None:
        """It lies there."""
        assert self.takes_q

    def start(self) -> None:
        """Queries go the same way: nothing can leave before they are there."""

    def attend(self, spec: AttentionSpec, sinks_H: Tensor | None) -> Tensor:
        del self.k, self.v, self.memory
        return self._trade.attend(partial(self._ring, spec=spec, sinks_H=own_sinks(sinks_H, self._ulysses)))


ProjectionViews = ViewOf | Shares
"""What a ring's peers, or Ulysses', take out of a projection as it lies."""


def projection_views(
    qkv_layout: QKVLayout, num_heads: int, num_kv_heads: int, ulysses: Transport
) -> ProjectionViews | None:
    """None where no place may have what lies so as its ``memory``."""
    return qkv_layout.keys_values if ulysses.size == 1 else shares_of(qkv_layout, num_heads, num_kv_heads, ulysses)


@contextmanager
def open_qkv_buffers(
    q_shape: Sequence[int],
    num_kv_heads: int,
    like: Tensor,
    *,
    layout: SequenceLayout,
    ring: Transport,
    ulysses: Transport,
    variant: RingVariant = "auto",
    gather_limit_bytes: int = 2 << 30,
    projected: ProjectionViews | None = None,
) -> Iterator[QKVBuffers]:
    """The place of a layer whose queries on this rank are [B, T, H, D], tokens in the order of ``layout.positions``;
    ``projected``: what is ``taken`` of the projection that will be its ``memory``.

    All ranks that share the sequence open it together. Behind the block the memory is somebody else's.
    """
    batch, local, num_heads, head_dim = q_shape
    assert local == layout.local_length
    along: dict[str, Any] = {
        "layout": layout, "transport": ring, "variant": variant, "gather_limit_bytes": gather_limit_bytes,
    }  # fmt: skip
    if ulysses.size > 1:
        trade: Trade | ProjectionTrade
        if isinstance(projected, Shares):
            trade = ProjectionTrade(projected, like, ulysses)
        else:
            trade = Trade(q_shape, num_kv_heads, like, ulysses)
        yield UlyssesBuffers(trade, ulysses, partial(ring_attention, **along))
        return
    within = projected if isinstance(projected, ViewOf) else None
    with KVExchange((batch, local, num_kv_heads, head_dim), like, within=within, **along) as exchange:
        yield RingBuffers(exchange, num_heads)


def own_sinks(sinks_H: Tensor | None, ulysses: Transport) -> Tensor | None:
    """The sinks of the heads that a Ulysses rank attends with."""
    if sinks_H is None:
        return None
    share = sinks_H.shape[0] // ulysses.size
    return sinks_H.narrow(0, ulysses.rank * share, share)
