"""Where one layer's queries, keys and values belong: written there by whoever makes them, nothing copies them again."""

# Shapes: B batch, l tokens on this rank, H query heads, K key/value heads, D head_dim.
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from ds_ring.attention.kv_exchange import Round
from ds_ring.attention.qkv_layout import Lying, Shares
from ds_ring.attention.ring import attend_round, ring_attention
from ds_ring.attention.spec import AttentionSpec
from ds_ring.attention.ulysses import HeadPart, ProjectionTrade, Trade, shares_of
from ds_ring.config import RingVariant
from ds_ring.parallel.layout import SequenceLayout
from ds_ring.transport.base import Transport
from ds_ring.transport.shared import Within

ALL = slice(None)


class Place(ABC):
    """The order of use: write ``k`` and ``v``, ``start``, write ``q`` (earlier does no harm), ``attend``."""

    k: list[HeadPart]
    v: list[HeadPart]
    kv_BlKD: tuple[Tensor, Tensor] | None = None
    """Keys and values whole, where they lie together."""
    memory: Tensor | None = None
    """What is to be written as a whole, where ``place`` was told how k and v lie in it."""
    takes_q = False
    """Whether queries may stay in the memory they were made in."""

    @property
    @abstractmethod
    def q(self) -> list[HeadPart]: ...

    def take_q(self, q_BlHD: Tensor) -> None:
        """In place of writing to ``q``; only where that is so."""
        raise NotImplementedError

    @abstractmethod
    def start(self) -> None:
        """Keys and values are written: whatever can travel already does from here on."""

    @abstractmethod
    def attend(self, spec: AttentionSpec, sinks_H: Tensor | None) -> Tensor:
        """out [B, l, H, D]; to be called once."""


class RingPlace(Place):
    """Keys and values in the tensor that peers read, queries in memory of this rank's own."""

    takes_q = True

    def __init__(self, travelling: Round, num_heads: int) -> None:
        self._travelling, self._num_heads = travelling, num_heads
        k_BlKD, v_BlKD = travelling.own_2BLKD
        self.kv_BlKD, self.memory = (k_BlKD, v_BlKD), travelling.memory
        self.k, self.v = [(ALL, k_BlKD)], [(ALL, v_BlKD)]
        self._q_BlHD: Tensor | None = None

    @property
    def q(self) -> list[HeadPart]:
        if self._q_BlHD is None:
            _, batch, local, _, head_dim = self._travelling.own_2BLKD.shape
            self._q_BlHD = self._travelling.own_2BLKD.new_empty((batch, local, self._num_heads, head_dim))
        return [(ALL, self._q_BlHD)]

    def take_q(self, q_BlHD: Tensor) -> None:
        self._q_BlHD = q_BlHD

    def start(self) -> None:
        self._travelling.start()

    def attend(self, spec: AttentionSpec, sinks_H: Tensor | None) -> Tensor:
        assert self._q_BlHD is not None
        return attend_round(self._q_BlHD, self._travelling, spec, sinks_H)


class UlyssesPlace(Place):
    """All three where the all-to-all sends them from: heads for each rank apart, or a projection as it is. With a ring
    behind it, K and V are copied once more on arrival."""

    def __init__(self, trade: Trade | ProjectionTrade, ulysses: Transport, ring: Callable[..., Tensor]) -> None:
        self._trade, self._ulysses, self._ring = trade, ulysses, ring
        self.k, self.v, self.memory = trade.k, trade.v, trade.memory
        self.takes_q = trade.memory is not None

    @property
    def q(self) -> list[HeadPart]:
        return self._trade.q

    def take_q(self, q_BlHD: Tensor) -> None:
        """It lies there."""
        assert self.takes_q

    def start(self) -> None:
        """Queries go the same way: nothing can leave before they are there."""

    def attend(self, spec: AttentionSpec, sinks_H: Tensor | None) -> Tensor:
        del self.k, self.v, self.memory
        return self._trade.attend(partial(self._ring, spec=spec, sinks_H=own_sinks(sinks_H, self._ulysses)))


Taken = Within | Shares
"""What a ring's peers, or Ulysses', take out of a projection as it lies."""


def taken(lying: Lying, num_heads: int, num_kv_heads: int, ulysses: Transport) -> Taken | None:
    """None where no place may have what lies so as its ``memory``."""
    return lying.keys_values if ulysses.size == 1 else shares_of(lying, num_heads, num_kv_heads, ulysses)


@contextmanager
def place(
    q_shape: Sequence[int],
    num_kv_heads: int,
    like: Tensor,
    *,
    layout: SequenceLayout,
    ring: Transport,
    ulysses: Transport,
    variant: RingVariant = "auto",
    gather_limit_bytes: int = 2 << 30,
    projected: Taken | None = None,
) -> Iterator[Place]:
    """The place of a layer whose queries on this rank are [B, l, H, D], tokens in the order of ``layout.positions``;
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
        yield UlyssesPlace(trade, ulysses, partial(ring_attention, **along))
        return
    within = projected if isinstance(projected, Within) else None
    with Round((batch, local, num_kv_heads, head_dim), like, within=within, **along) as travelling:
        yield RingPlace(travelling, num_heads)


def own_sinks(sinks_H: Tensor | None, ulysses: Transport) -> Tensor | None:
    """The sinks of the heads that a Ulysses rank attends with."""
    if sinks_H is None:
        return None
    share = sinks_H.shape[0] // ulysses.size
    return sinks_H.narrow(0, ulysses.rank * share, share)
