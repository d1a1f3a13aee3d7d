"""What a one-sided transport needs of the hardware: memory that peers can read, flags they can raise, ordered queues.

Small on purpose: the copy engine's protocol (``peer_buffers.py``) is written against this, so that tests can run it
over threads with every delay that a GPU might show.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ds_ring.transport.shared import Pending


class Queue(Protocol):
    """Work in order, apart from the host: a CUDA stream. Every method only appends."""

    def after(self, other: Queue) -> None:
        """Nothing appended from now on starts before all that ``other`` holds now is done."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Of one shape and dtype; ``source`` and ``target`` are rows at one distance each (``rows_of``), and if neither
        is contiguous, of one width."""

    def raise_flag(self, memory: PeerMemory, rank: int, flag: int, value: int) -> None:
        """Set a flag of ``rank``'s memory, visibly after everything appended before."""

    def wait_flag(self, memory: PeerMemory, flag: int, value: int) -> None:
        """Hold what follows until a flag of this rank's memory is at least ``value``."""

    def mark(self) -> Pending:
        """Its ``wait`` makes the queue of computations go on only when all that is here now is done."""


def rows_of(tensor: Tensor) -> tuple[int, int, int] | None:
    """(how many, elements of each, elements from one to the next) where ``tensor`` is whole rows at one distance; None
    where it is not."""
    sizes = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]
    width = 1
    while sizes and sizes[-1][1] == width:
        width *= sizes.pop()[0]
    count, distance = 1, sizes[-1][1] if sizes else width
    while sizes and sizes[-1][1] == count * distance:
        count *= sizes.pop()[0]
    apart = count == 1 or distance >= width  # not so where a tensor was expanded
    return (count, width, distance) if apart and not sizes else None


class PeerMemory(Protocol):
    """One allocation on every rank of a group. Flags start at 0 and only ever rise."""

    nbytes: int

    def data(self, rank: int) -> Tensor:
        """``rank``'s bytes, uint8 [nbytes]; those of others are for reading."""


class Device(Protocol):
    """One rank's side of a group."""

    def allocate(self, nbytes: int, flags: int) -> PeerMemory:
        """Collective, with equal arguments; where it fails on one rank it fails on all. Whatever any rank had queued
        before is done when it returns. What all ranks have freed may be used again."""

    def free(self, memory: PeerMemory) -> None:
        """Collective, of one allocation. Whatever any rank had queued before is done; from here on nobody reads it."""

    def computations(self) -> Queue:
        """The queue in which the caller's computations run."""

    def pulls(self, peer: int) -> Queue:
        """The queue for what comes from ``peer``."""
