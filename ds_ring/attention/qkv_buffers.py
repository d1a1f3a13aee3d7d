"""The buffers that one layer's q, k and v are written to, where other ranks read them: no copy follows.

Whoever makes q, k and v (``fusion/kv_first.py``) opens the buffers of a layer, writes into them and attends from them.
``Destination`` names whose buffers they are; ``ProjectionViews`` say what other ranks read where one fused projection
writes all of q, k and v at once.
"""

# Shapes: B batch, T tokens on this rank, H query heads, K key/value heads, D head_dim, W columns of a projection.
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor

from ds_ring.attention.kv_exchange import KVExchange
from ds_ring.attention.qkv_layout import ColumnsByRank, QKVLayout
from ds_ring.attention.ring import attend_exchange, ring_attention
from ds_ring.attention.spec import AttentionSpec
from ds_ring.attention.ulysses import HeadAllToAll, HeadBuffer, ProjectionAllToAll, columns_by_rank
from ds_ring.config import RingVariant
from ds_ring.parallel.layout import SequenceLayout
from ds_ring.transport.base import Transport
from ds_ring.transport.shared import ViewOf

ALL = slice(None)

Destination = Literal["ring_buffer", "ulysses_buffer", "own_memory"]
"""Where a layer's q, k and v are written.

- ring_buffer: k and v where the ranks of the ring read them, which may be this rank alone; q in memory of its own.
- ulysses_buffer: all three in the send buffer of the all-to-all.
- own_memory: three tensors, which the attention copies to other ranks.
"""


@dataclass(frozen=True)
class ProjectionViews:
    """What other ranks read out of the result of one fused projection, in place.

    Attributes:
        num_kv_heads, head_dim: of the projection's k and v on this rank.
        read: k and v as one view, by a ring; the columns of each rank's heads, by a Ulysses group.
    """

    num_kv_heads: int
    head_dim: int
    read: ViewOf | ColumnsByRank


def projection_views(qkv_layout: QKVLayout, num_heads: int, ulysses: Transport) -> ProjectionViews | None:
    """None where other ranks cannot read q, k and v in the projection's result, so that each is written by itself."""
    num_kv_heads, head_dim = qkv_layout.k_BTKD.shape[2:]
    if ulysses.size > 1:
        columns = columns_by_rank(qkv_layout, num_heads, num_kv_heads, ulysses)
        return None if columns is None else ProjectionViews(num_kv_heads, head_dim, columns)
    view = qkv_layout.kv_view()
    return None if view is None else ProjectionViews(num_kv_heads, head_dim, view)


class QKVBuffers(ABC):
    """The buffers of one layer. The order of use: write ``k`` and ``v``, ``start``, write ``q``, ``attend``.

    ``q`` may be written earlier. Where the buffers were opened for a fused projection, its result is written to
    ``memory`` in place of all three.

    Attributes:
        k, v: which heads are to be written to which buffer.
        kv_BTKD: k and v of all heads, where they are together; None with Ulysses.
        memory: [B, T, W], contiguous: what a fused projection is to be written to.
    """

    k: list[HeadBuffer]
    v: list[HeadBuffer]
    kv_BTKD: tuple[Tensor, Tensor] | None = None
    memory: Tensor | None = None

    @property
    @abstractmethod
    def q(self) -> list[HeadBuffer]: ...

    @abstractmethod
    def take_q(self, q_BTHD: Tensor) -> None:
        """In place of writing to ``q``: it stays in the memory that its projection wrote, rotated there.

        A ring takes any q, Ulysses only one that is a part of ``memory``.
        """

    @abstractmethod
    def start(self) -> None:
        """k and v are written: whatever can be sent already is sent from here on."""

    @abstractmethod
    def attend(self, spec: AttentionSpec, sinks_H: Tensor | None) -> Tensor:
        """out [B, T, H, D]; to be called once."""


class RingBuffers(QKVBuffers):
    """k and v in the tensor that the ranks of the ring read, q in memory of this rank's own."""

    def __init__(self, exchange: KVExchange, num_heads: int) -> None:
        self._exchange, self._num_heads = exchange, num_heads
        k_BTKD, v_BTKD = exchange.own_2BLKD
        self.kv_BTKD, self.memory = (k_BTKD, v_BTKD), exchange.memory
        self.k, self.v = [(ALL, k_BTKD)], [(ALL, v_BTKD)]
        self._q_BTHD: Tensor | None = None

    @property
    def q(self) -> list[HeadBuffer]:
        if self._q_BTHD is None:
            _, batch, local, _, head_dim = self._exchange.own_2BLKD.shape
            self._q_BTHD = self._exchange.own_2BLKD.new_empty((batch, local, self._num_heads, head_dim))
        return [(ALL, self._q_BTHD)]

    def take_q(self, q_BTHD: Tensor) -> None:
        self._q_BTHD = q_BTHD

    def start(self) -> None:
        self._exchange.start()

    def attend(self, spec: AttentionSpec, sinks_H: Tensor | None) -> Tensor:
        assert self._q_BTHD is not None
        return attend_exchange(self._q_BTHD, self._exchange, spec, sinks_H)


class UlyssesBuffers(QKVBuffers):
    """All three in the send buffer of the all-to-all: each rank's heads apart, or one fused projection's result.

    Where a ring follows, it copies k and v of the whole slice once more.
    """

    def __init__(
        self, all_to_all: HeadAllToAll | ProjectionAllToAll, ulysses: Transport, ring: Callable[..., Tensor]
    ) -> None:
        self._all_to_all, self._ulysses, self._ring = all_to_all, ulysses, ring
        self.k, self.v, self.memory = all_to_all.k, all_to_all.v, all_to_all.memory

    @property
    def q(self) -> list[HeadBuffer]:
        return self._all_to_all.q

    def take_q(self, q_BTHD: Tensor) -> None:
        assert self.memory is not None, "q is not a part of the send buffer"

    def start(self) -> None:
        """Nothing can be sent before q is there: it goes in the same all-to-all."""

    def attend(self, spec: AttentionSpec, sinks_H: Tensor | None) -> Tensor:
        del self.k, self.v, self.memory
        return self._all_to_all.attend(partial(self._ring, spec=spec, sinks_H=own_sinks(sinks_H, self._ulysses)))


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
    projection: ProjectionViews | None = None,
) -> Iterator[QKVBuffers]:
    """The buffers of a layer. All ranks that share the sequence open them together. After the block the memory may be
    given to another layer.

    Args:
        q_shape: [B, T, H, D] of this rank, tokens in the order of ``layout.positions``.
        like: a tensor of the buffers' dtype and device.
        variant, gather_limit_bytes: as for ``ring_attention``.
        projection: what other ranks read of the fused projection that will be written to ``memory``.
    """
    batch, local, num_heads, head_dim = q_shape
    assert local == layout.local_length
    ring_options: dict[str, Any] = {
        "layout": layout, "transport": ring, "variant": variant, "gather_limit_bytes": gather_limit_bytes,
    }  # fmt: skip
    read = None if projection is None else projection.read
    if ulysses.size > 1:
        all_to_all: HeadAllToAll | ProjectionAllToAll
        if isinstance(read, ColumnsByRank):
            all_to_all = ProjectionAllToAll(read, like, ulysses)
        else:
            all_to_all = HeadAllToAll(q_shape, num_kv_heads, like, ulysses)
        yield UlyssesBuffers(all_to_all, ulysses, partial(ring_attention, **ring_options))
        return
    view = read if isinstance(read, ViewOf) else None
    with KVExchange((batch, local, num_kv_heads, head_dim), like, view=view, **ring_options) as exchange:
        yield RingBuffers(exchange, num_heads)


def own_sinks(sinks_H: Tensor | None, ulysses: Transport) -> Tensor | None:
    """The sinks of the heads that this Ulysses rank attends with."""
    if sinks_H is None:
        return None
    share = sinks_H.shape[0] // ulysses.size
    return sinks_H.narrow(0, ulysses.rank * share, share)
