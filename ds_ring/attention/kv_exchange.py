"""The exchange of one layer's keys and values in a ring: this rank's, written once, and those that arrive.

At hop s a rank receives from rank ``own - s`` and sends to rank ``own + s``, modulo the size of the ring. Keys and
values come straight from the rank that owns them; no rank passes on another's. On a switch every pair of GPUs is as
near as any other, and only what the receiver's queries can see has to be sent: under causal attention half of a zigzag
slice to later ranks, and nothing of a contiguous slice to earlier ranks.
"""

# Shapes: B batch, L tokens of this rank's slice, S keys that are seen, K key/value heads, D head_dim.
from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Literal, Self

from torch import Tensor

from ds_ring.attention.segments import Segment
from ds_ring.config import RingVariant
from ds_ring.parallel.layout import SequenceLayout, TokenRange
from ds_ring.transport.base import Transport
from ds_ring.transport.shared import PeerPart, Pending, ViewOf

Variant = Literal["pass_kv", "gather_kv", "local_first"]


class KVExchange:
    """A context manager. The order of use is

        with KVExchange(shape, like, ...) as exchange:
            ...                                             write exchange.own_2BLKD, or the memory that it is a part of
            exchange.start()                                from here on it must not change; transfers begin
            for source, block in exchange.blocks(): ...     with pass_kv
            segments = exchange.all_segments(...)           or with one of the variants that gather

    Where the transport can write a received part at any address (``puts``), gathered keys are in the sequence's order,
    with room for this rank's own: few segments, whatever the number of ranks. Few segments are better because a kernel
    works in blocks of keys, and the last block of a segment is not full. This rank's own keys are copied into the
    sequence's order only for a kernel that takes one segment: a copy within a GPU is a kernel, and costs more than a
    block that is not full.

    The ranks of a ring open exchanges of equal shapes in the same order.

    Attributes:
        own_2BLKD: this rank's keys and values.
        memory: the tensor that ``own_2BLKD`` is a view of, or ``own_2BLKD`` itself.
        variant: how the other ranks' keys are attended to; it follows from the layout and the transport.
        limit_bytes: limit on the memory for the K/V of all ranks, and on that of a running result.
        may_gather: whether ``pass_kv`` may gather all the same. The configuration did not ask for it, it was chosen to
            save memory; and in a ring of two it holds no less than gathering would, all visible K/V at once.
    """

    def __init__(
        self,
        shape_BLKD: Sequence[int],
        like: Tensor,
        *,
        layout: SequenceLayout,
        transport: Transport,
        variant: RingVariant = "auto",
        gather_limit_bytes: int = 2 << 30,
        view: ViewOf | None = None,
    ) -> None:
        """
        Args:
            shape_BLKD: of this rank's keys.
            like: a tensor of their dtype and device.
            variant, gather_limit_bytes: as for ``ring_attention``.
            view: which view of ``memory`` is ``own_2BLKD``; None: all of it.
        """
        assert transport.size == layout.ring_degree
        assert shape_BLKD[1] == layout.slice_length
        self.layout, self.transport = layout, transport
        self._shared = transport.share((2, *shape_BLKD), like, view)
        self.own_2BLKD, self.memory = self._shared.own, self._shared.memory
        self.variant = _variant(variant, self.own_2BLKD.nbytes, transport, gather_limit_bytes)
        self.limit_bytes = gather_limit_bytes
        self.may_gather = self.variant == "pass_kv" != variant and transport.size == 2
        self._hops = iter(range(1, transport.size))
        self._whole_2BSKD: Tensor | None = None
        self._pendings: list[Pending] = []
        self._arriving: deque[tuple[int, Pending, Tensor]] = deque()

    def write(self, k_BLKD: Tensor, v_BLKD: Tensor) -> None:
        self.own_2BLKD[0].copy_(k_BLKD)
        self.own_2BLKD[1].copy_(v_BLKD)

    def start(self) -> None:
        """Publish this rank's keys, and begin to receive what the variant holds at a time: one block ahead, or all."""
        self.transport.meet_lanes()
        rank, size = self.transport.rank, self.transport.size
        targets = [(rank + hop) % size for hop in range(1, size)]
        self._shared.publish([self._visible(target, rank, target) for target in targets])
        if self.variant != "pass_kv" and self._shared.puts:
            self._whole_2BSKD = self._pull_in_order()
            return
        for _ in range(1 if self.variant == "pass_kv" else size - 1):
            self._pull_next()

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(rank, its visible K/V [2, B, S, K, D]) of every other rank, from rank - 1 downwards, each when it has
        arrived; S may be 0.

        The next block is in transfer while the caller computes with one. The caller should drop a block before it asks
        for the next.
        """
        while self._arriving:
            source, pending, block_2BSKD = self._arriving.popleft()
            self._pull_next()
            pending.wait()
            yield source, block_2BSKD

    def foreign_segments(self) -> list[Segment]:
        """The K/V of other ranks that this rank's queries see, when all of it has arrived."""
        if self._whole_2BSKD is None:
            return [segment for source, block in self.blocks() for segment in self._segments(source, *block)]
        for pending in self._pendings:
            pending.wait()
        edges = [0, *(edge for token_range in self._own_ranges for edge in (token_range.start, token_range.stop))]
        between = [(start, stop) for start, stop in zip(edges[0::2], edges[1::2], strict=False) if start < stop]
        return [Segment(start, *self._whole_2BSKD[:, :, start:stop]) for start, stop in between]

    def all_segments(self, joined: bool = False) -> list[Segment]:
        """``foreign_segments`` and this rank's own.

        Args:
            joined: in one segment, into which this rank's own K/V are copied, where the transport can write in order.
        """
        own, foreign = self._segments(self.transport.rank, *self.own_2BLKD), self.foreign_segments()
        if not joined or self._whole_2BSKD is None:
            return own + foreign
        for segment in own:
            for whole_BSKD, part_BSKD in zip(self._whole_2BSKD, (segment.k_BSKD, segment.v_BSKD), strict=True):
                whole_BSKD[:, segment.start : segment.stop] = part_BSKD
        return [Segment(0, *self._whole_2BSKD)]

    @property
    def _own_ranges(self) -> tuple[TokenRange, ...]:
        return self.layout.slice_ranges(self.transport.rank)

    def _segments(self, source: int, k_BSKD: Tensor, v_BSKD: Tensor) -> list[Segment]:
        """The token ranges of a slice, of which a prefix of whole ranges is visible. Ranges that follow each other are
        one segment."""
        found: list[tuple[int, slice]] = []
        stop = taken = 0
        for token_range in self.layout.slice_ranges(source):
            if taken < k_BSKD.shape[1]:
                follows = found and token_range.start == stop
                start, tokens = found.pop() if follows else (token_range.start, slice(taken, taken))
                taken, stop = taken + token_range.length, token_range.stop
                found.append((start, slice(tokens.start, taken)))
        return [Segment(start, k_BSKD[:, tokens], v_BSKD[:, tokens]) for start, tokens in found]

    def _pull_in_order(self) -> Tensor:
        """[2, B, S, K, D] of all positions that this rank sees; its own are left unwritten."""
        rank, size, end = self.transport.rank, self.transport.size, self._own_ranges[-1].stop
        _, batch, _, *rest = self.own_2BLKD.shape
        whole_2BSKD = self._shared.room((2, batch, end, *rest))
        for hop in range(1, size):
            source = (rank - hop) % size
            incoming = self._visible(rank, source, source)
            if incoming is not None:
                seen = [token_range for token_range in self.layout.slice_ranges(source) if token_range.start < end]
                targets = [whole_2BSKD[:, :, token_range.start : token_range.stop] for token_range in seen]
                self._pendings.append(self._shared.pull_into(incoming, targets, dim=2))
        return whole_2BSKD

    def _pull_next(self) -> None:
        hop = next(self._hops, None)
        if hop is not None:
            rank = self.transport.rank
            source = (rank - hop) % self.transport.size
            incoming = self._visible(rank, source, source)
            pending, block_2BSKD = self._shared.pull(incoming)
            self._arriving.append((source, pending, block_2BSKD if incoming else self.own_2BLKD[:, :, :0]))

    def _visible(self, q_rank: int, k_rank: int, peer: int) -> PeerPart | None:
        """The part of ``own_2BLKD`` that is sent from ``k_rank`` to ``q_rank``: the tokens that its queries see, a
        prefix. ``peer`` is the other rank of the two."""
        tokens = self.layout.visible_rows(q_rank, k_rank)
        return (peer, (slice(None), slice(None), slice(0, tokens))) if tokens else None

    def __enter__(self) -> Self:
        self._shared.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._shared.__exit__(kind, error, at)


def _variant(wanted: RingVariant, own_bytes: int, transport: Transport, gather_limit_bytes: int) -> Variant:
    if wanted != "auto" and wanted != "pass_q":
        return wanted
    # Computed from the layout alone, so that all ranks decide alike.
    if own_bytes * transport.size > gather_limit_bytes:
        return "pass_kv"
    # Attending to the own block first costs a second call. That does not pay where another micro-batch runs during the
    # transfer, or where transfers slow the kernels beside them.
    hides = transport.overlaps and transport.meanwhile is None
    return "local_first" if hides else "gather_kv"
