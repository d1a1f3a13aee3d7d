"""One layer's keys and values on their way round the ring: where they are written, and the peers' as they come.

At hop s a rank receives from the rank s places before it and sends to the rank s places after it, straight from the
owner rather than handed on from neighbour to neighbour. On a switch every pair is as near as any other, and only what
the receiver's queries can see has to move: under causal attention half of a zigzag slice to later ranks, nothing of a
contiguous one to earlier ranks.
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
    """A context manager; the order of use is

        with Round(shape, like, ...) as exchange:
            ...                                  write exchange.own_2BLKD, or the memory that it is a part of
            exchange.start()                   from here on it must stay as it is; transfers begin
            for source, block in exchange.blocks(): ...        pass_kv, or
            segments = exchange.all_segments(...)              one of the two that gather

    Where the transport can put parts where they are wanted, what is gathered lies in the sequence's order, with room
    for this rank's own: few segments, whatever the number of ranks. A kernel works in blocks of keys, and every segment
    ends in a part of one. The own stay where they were made unless a kernel takes one segment only: copies within a GPU
    are kernels, and cost more than a part of a block.

    Ranks of a ring hold rounds of equal shapes in the same order.

    Attributes:
        own_2BLKD: this rank's keys and values.
        memory: what they are a part of, or they themselves.
        variant: how the peers' are attended to; it follows from the layout and the transport.
        limit_bytes: what is held of all K/V, and of a running result, at most.
        may_gather: ``pass_kv`` was not asked for but taken to save memory, and with one peer holds no less than
            gathering would: all that is seen, at once.
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
        within: ViewOf | None = None,
    ) -> None:
        """``within``: where keys and values, [2, *shape_BLKD], lie in ``memory``."""
        assert transport.size == layout.ring_degree
        assert shape_BLKD[1] == layout.slice_length
        self.layout, self.transport = layout, transport
        self._shared = transport.share((2, *shape_BLKD), like, within)
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
        """Publish, and begin to take what this variant holds at a time: one block ahead, or all."""
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
        """(whose, [2, B, S, K, D]) of every peer, nearest before us first, each once it is there; S may be 0.

        While one is computed the next is on its way. A block should be let go before the next is asked for.
        """
        while self._arriving:
            source, pending, block_2BSKD = self._arriving.popleft()
            self._pull_next()
            pending.wait()
            yield source, block_2BSKD

    def foreign_segments(self) -> list[Segment]:
        """All that this rank sees of its peers, once it is there."""
        if self._whole_2BSKD is None:
            return [segment for source, block in self.blocks() for segment in self._segments(source, *block)]
        for pending in self._pendings:
            pending.wait()
        edges = [0, *(edge for token_range in self._own_ranges for edge in (token_range.start, token_range.stop))]
        between = [(start, stop) for start, stop in zip(edges[0::2], edges[1::2], strict=False) if start < stop]
        return [Segment(start, *self._whole_2BSKD[:, :, start:stop]) for start, stop in between]

    def all_segments(self, joined: bool = False) -> list[Segment]:
        """And its own; ``joined``: in one where the transport puts parts in order, its own copied among them."""
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
        """The runs of a slice, as far as they are there: what is visible is a prefix, in whole runs. Neighbours are one
        segment."""
        found: list[tuple[int, slice]] = []
        stop = taken = 0
        for token_range in self.layout.slice_ranges(source):
            if taken < k_BSKD.shape[1]:
                start, rows = (
                    found.pop() if token_range.start == stop and found else (token_range.start, slice(taken, taken))
                )
                taken, stop = taken + token_range.length, token_range.stop
                found.append((start, slice(rows.start, taken)))
        return [Segment(start, k_BSKD[:, rows], v_BSKD[:, rows]) for start, rows in found]

    def _pull_in_order(self) -> Tensor:
        """[2, B, S, K, D] of all positions that this rank sees; its own are left blank."""
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
        """Each peer's part is the prefix of rows that its queries see."""
        rows = self.layout.visible_rows(q_rank, k_rank)
        return (peer, (slice(None), slice(None), slice(0, rows))) if rows else None

    def __enter__(self) -> Self:
        self._shared.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._shared.__exit__(kind, error, at)


def _variant(wanted: RingVariant, own_bytes: int, transport: Transport, gather_limit_bytes: int) -> Variant:
    if wanted != "auto" and wanted != "pass_q":
        return wanted
    # A property of the layout, so that all ranks decide alike.
    if own_bytes * transport.size > gather_limit_bytes:
        return "pass_kv"
    # With another micro-batch to run meanwhile, or no gain from running on, the cheaper single call is better.
    hides = transport.overlaps and transport.meanwhile is None
    return "local_first" if hides else "gather_kv"
