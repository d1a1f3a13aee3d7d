"""A tensor whose parts peers of a group want: written once, published, and taken part by part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from torch import Tensor

Index = tuple[slice | int, ...]
PeerPart = tuple[int, Index]
"""(peer, index): ``tensor[index]`` of a shared tensor, for a peer or from it."""


@dataclass(frozen=True)
class ViewOf:
    """Where a tensor lies that is a part of a larger one: of a whole of ``shape``, contiguous, ``offset`` elements from
    its start, at ``strides``."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def part(self, whole: Tensor, shape: Sequence[int]) -> Tensor:
        return whole.as_strided(tuple(shape), self.strides, whole.storage_offset() + self.offset)


class Pending(Protocol):
    """Communication under way. On a GPU ``wait`` orders the current stream after it, without blocking the host."""

    def wait(self) -> None: ...


class SharedTensor(ABC):
    """One round of sharing, along one axis; a context manager, and the order of use is

        with transport.share(shape, like) as shared:
            ...                                  write shared.own
            shared.publish(outgoing)             from here on it must stay as it is
            pending, part = shared.pull(...)     once for each entry of ``outgoing``
            pending.wait()                       then read ``part``; ``shared.own`` may be read all along
                                                 behind the block the memory is somebody else's

    All ranks of the group share tensors of equal shapes and dtypes in the same order. A peer pulls what was published
    for it: both sides derive the parts from the layout.
    """

    own: Tensor
    """This rank's tensor: all of ``memory``, or a part of it."""
    memory: Tensor
    """Contiguous."""
    puts = False
    """Whether ``room`` and ``pull_into`` are offered."""

    @abstractmethod
    def publish(self, outgoing: Sequence[PeerPart | None]) -> None:
        """``own`` is written. ``outgoing`` lists who reads which part, each peer at most once."""

    @abstractmethod
    def pull(self, incoming: PeerPart | None) -> tuple[Pending, Tensor]:
        """Start to take a part of a peer's tensor; None: nothing this time, and an empty tensor.

        Where bytes move as messages, the n-th pull gives out the n-th entry of ``outgoing``: ranks must pull in such
        an order that entries meet.
        """

    def room(self, shape: Sequence[int]) -> Tensor:
        """Memory for what ``pull_into`` is to take."""
        raise NotImplementedError

    def pull_into(self, incoming: PeerPart, targets: Sequence[Tensor], dim: int) -> Pending:
        """As ``pull``, but into ``targets``: parts of a ``room``, pieces of what comes along ``dim``, first to last."""
        raise NotImplementedError

    @abstractmethod
    def close(self) -> None:
        """No more is read from ``own`` by this rank than what is queued already."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def blank_part(self, incoming: PeerPart | None) -> Tensor:
        """Memory for what ``pull`` takes: a peer's tensor has the shape of ours."""
        if incoming is None:
            return self.own.new_empty(0)
        return self.own.new_empty(self.own[incoming[1]].shape)


class SentTensor(SharedTensor):
    """Parts travel as messages: what every transport can do."""

    def __init__(
        self,
        memory: Tensor,
        own: Tensor,
        exchange: Callable[[Sequence[tuple[int, Tensor]], Sequence[tuple[int, Tensor]]], Pending],
    ) -> None:
        self.memory, self.own, self._exchange = memory, own, exchange
        self._sent = own
        self._outgoing: list[PeerPart | None] = []

    def publish(self, outgoing: Sequence[PeerPart | None]) -> None:
        self._outgoing = list(outgoing)
        self._sent = self.own.contiguous()

    def pull(self, incoming: PeerPart | None) -> tuple[Pending, Tensor]:
        outgoing = self._outgoing.pop(0)
        # A part of a batched tensor is strided; messages must be whole memory.
        sends = [(outgoing[0], self._sent[outgoing[1]].contiguous())] if outgoing else []
        part = self.blank_part(incoming)
        receives = [(incoming[0], part)] if incoming else []
        return self._exchange(sends, receives), part

    def close(self) -> None:
        self._outgoing, self._sent = [], self.own
