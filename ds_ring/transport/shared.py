"""A tensor whose parts peers of a group want: written once, published, and taken part by part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol, Self

from torch import Tensor

Index = tuple[slice | int, ...]
Part = tuple[int, Index]
"""(peer, index): ``tensor[index]`` of a shared tensor, for a peer or from it."""


class Pending(Protocol):
    """Communication under way. On a GPU ``wait`` orders the current stream after it, without blocking the host."""

    def wait(self) -> None: ...


class Shared(ABC):
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
    """This rank's tensor, contiguous."""
    places = False
    """Whether ``fill``, ``copy`` and ``pull_into`` are offered: parts come from where they are and go where they are
    wanted, at no cost to computations."""

    def fill(self, pieces: Sequence[tuple[Tensor, Tensor]]) -> None:
        """In place of writing ``own``: copy ``pieces``, (part of it, what it is to be), from rows at one distance
        (``peer_memory.rows_of``). What they are copied from must stay until the block ends."""
        raise NotImplementedError

    def copy(self, pieces: Sequence[tuple[Tensor, Tensor]]) -> Pending:
        """Copy ``pieces``, (target, what computations have made), of this rank's own memory; otherwise as ``fill``."""
        raise NotImplementedError

    @abstractmethod
    def publish(self, outgoing: Sequence[Part | None]) -> None:
        """``own`` is written. ``outgoing`` lists who reads which part, each peer at most once."""

    @abstractmethod
    def pull(self, incoming: Part | None) -> tuple[Pending, Tensor]:
        """Start to take a part of a peer's tensor; None: nothing this time, and an empty tensor.

        Where bytes move as messages, the n-th pull gives out the n-th entry of ``outgoing``: ranks must pull in such
        an order that entries meet.
        """

    def pull_into(self, incoming: Part, targets: Sequence[Tensor], dim: int) -> Pending:
        """As ``pull``, but into ``targets``, which are the part's pieces along ``dim``, first to last."""
        raise NotImplementedError

    @abstractmethod
    def close(self) -> None:
        """No more is read from ``own`` by this rank than what is queued already."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def blank_part(self, incoming: Part | None) -> Tensor:
        """Memory for what ``pull`` takes: a peer's tensor has the shape of ours."""
        if incoming is None:
            return self.own.new_empty(0)
        return self.own.new_empty(self.own[incoming[1]].shape)


class SentShared(Shared):
    """Parts travel as messages: what every transport can do."""

    def __init__(
        self, own: Tensor, exchange: Callable[[Sequence[tuple[int, Tensor]], Sequence[tuple[int, Tensor]]], Pending]
    ) -> None:
        self.own, self._exchange = own, exchange
        self._outgoing: list[Part | None] = []

    def publish(self, outgoing: Sequence[Part | None]) -> None:
        self._outgoing = list(outgoing)

    def pull(self, incoming: Part | None) -> tuple[Pending, Tensor]:
        outgoing = self._outgoing.pop(0)
        # A part of a batched tensor is strided; messages must be whole memory.
        sends = [(outgoing[0], self.own[outgoing[1]].contiguous())] if outgoing else []
        part = self.blank_part(incoming)
        receives = [(incoming[0], part)] if incoming else []
        return self._exchange(sends, receives), part

    def close(self) -> None:
        self._outgoing = []
