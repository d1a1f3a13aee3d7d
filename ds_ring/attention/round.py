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

from ds_ring.config import RingVariant
from ds_ring.layout import SequenceLayout
from ds_ring.transport.base import Transport
from ds_ring.transport.shared import Part, Pending

Variant = Literal["pass_kv", "gather_kv", "local_first"]


class Round:
    """A context manager; the order of use is

        with Round(shape, like, ...) as travelling:
            ...                                  write travelling.own_2BLKD
            travelling.start()                   from here on it must stay as it is; transfers begin
            for source, block in travelling.blocks(): ...

    Ranks of a ring hold rounds of equal shapes in the same order.

    Attributes:
        own_2BLKD: this rank's keys and values, for the peers to take and for its own attention to read.
        variant: how the peers' are attended to; it follows from the layout and the transport.
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
    ) -> None:
        assert transport.size == layout.ring_degree
        assert shape_BLKD[1] == layout.slice_length
        self.layout, self.transport = layout, transport
        self._shared = transport.share((2, *shape_BLKD), like)
        self.own_2BLKD = self._shared.own
        self.variant = _variant(variant, self.own_2BLKD.nbytes, transport, gather_limit_bytes)
        self.may_gather = self.variant == "pass_kv" != variant and transport.size == 2
        self._hops = iter(range(1, transport.size))
        self._arriving: deque[tuple[int, Pending, Tensor]] = deque()

    def write(self, k_BLKD: Tensor, v_BLKD: Tensor) -> None:
        self.own_2BLKD[0].copy_(k_BLKD)
        self.own_2BLKD[1].copy_(v_BLKD)

    def start(self) -> None:
        """Publish, and begin to take what this variant holds at a time: one block ahead, or all."""
        rank, size = self.transport.rank, self.transport.size
        targets = [(rank + hop) % size for hop in range(1, size)]
        self._shared.publish([self._visible(target, rank, target) for target in targets])
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

    def _pull_next(self) -> None:
        hop = next(self._hops, None)
        if hop is not None:
            rank = self.transport.rank
            source = (rank - hop) % self.transport.size
            incoming = self._visible(rank, source, source)
            pending, block_2BSKD = self._shared.pull(incoming)
            self._arriving.append((source, pending, block_2BSKD if incoming else self.own_2BLKD[:, :, :0]))

    def _visible(self, q_rank: int, k_rank: int, peer: int) -> Part | None:
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
