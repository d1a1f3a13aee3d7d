"""What is asked of communication along one axis of the mesh.

This base class keeps account of what is sent (``traffic``); implementations, in the methods with an underscore, move
bytes. Ranks are always numbered inside the group, 0 .. size-1.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from ds_ring import errors
from ds_ring.errors import DisagreementError, TransportError, UserError, reason_of
from ds_ring.transport import wire
from ds_ring.transport.shared import Pending, SentTensor, SharedTensor, ViewOf

__all__ = ["Done", "Message", "Pending", "T", "Traffic", "Transport"]

T = TypeVar("T")
Message = tuple[int, Tensor]
"""(peer, tensor): what goes to, or comes from, one peer."""


_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, UserError)
} | {"TransportError": TransportError}
"""The errors that one rank may repeat of another, by name."""


def _kind_to_repeat(error: Exception) -> str:
    """The name of the nearest kind of ``error`` that others can raise: TransportError, unless a user can mend it."""
    return next((kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _KINDS), "TransportError")


class Done:
    """Communication that has already happened."""

    def wait(self) -> None:
        return None


@dataclass
class Traffic:
    """What one rank sends, over all axes: bytes by operation, and how many operations have begun."""

    bytes_by_op: Counter[str] = field(default_factory=Counter)
    count: int = 0
    last: str = ""
    """The name of the last operation, which began at ``moved_at`` (``time.monotonic``)."""
    moved_at: float = 0.0

    @property
    def bytes_sent(self) -> int:
        return sum(self.bytes_by_op.values())

    def add(self, operation: str, sent: int) -> None:
        """An operation begins in which this rank sends so many bytes."""
        self.bytes_by_op[operation] += sent
        self.last, self.count, self.moved_at = operation, self.count + 1, time.monotonic()


class Transport(ABC):
    """Point-to-point and collective movement among the ranks of one group."""

    name = "messages"
    overlaps = False
    """Whether transfers cost the kernels beside them (almost) nothing."""
    trades_columns = False
    """Whether ``all_to_all_columns`` is offered."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.place = ""
        """Where this rank is, for messages about it; empty where that says nothing."""
        self.traffic = Traffic()
        self.beforehand: Callable[[], None] | None = None
        """Called when transfers could begin: time for other micro-batches to come as far, so that all go at once."""
        self.meanwhile: Callable[[], None] | None = None
        """Called when transfers are under way and only waiting is left: time for another micro-batch."""

    @property
    def shared_bytes(self) -> int:
        """Memory that peers can read, which is apart from what PyTorch's allocator counts."""
        return 0

    def self_test(self, device: torch.device) -> None:  # noqa: B027
        """Collective. Raise an error where what this transport relies on does not hold on ``device``; where one rank of
        the group raises, all do."""

    def reserve(self, shapes: Sequence[Sequence[int]], like: Tensor) -> None:  # noqa: B027
        """Tensors of these shapes will be shared, one opened before another is published. Collective."""

    def share(self, shape: Sequence[int], like: Tensor, within: ViewOf | None = None) -> SharedTensor:
        """A tensor of ``like``'s dtype and device for peers to take parts of; see ``SharedTensor``."""
        memory = like.new_empty(within.shape if within else tuple(shape))
        return SentTensor(memory, within.part(memory, shape) if within else memory, self.exchange)

    def send_buffer(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Where best to write what ``all_to_all`` will send: at once, and once."""
        return like.new_empty(tuple(shape))

    def meet_lanes(self) -> None:
        """Let ``beforehand`` happen."""
        if self.beforehand is not None:
            self.beforehand()

    def yield_lane(self) -> None:
        """Let ``meanwhile`` happen."""
        if self.meanwhile is not None:
            self.meanwhile()

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Start sending each tensor to its peer and receiving into each buffer from its peer.

        Tensors must be contiguous; a sent tensor must stay unchanged, and a received one unread, until ``wait``.
        All ranks of the group must call in the same order; a rank with nothing to move may pass empty lists.
        """
        for _, tensor in (*sends, *receives):
            assert tensor.is_contiguous(), "messages must be contiguous"
        self.traffic.add("exchange", sum(t.nbytes for _, t in sends))
        return self._exchange(sends, receives) if sends or receives else Done()

    def all_to_all(self, send: Tensor) -> Tensor:
        """``send[i]`` goes to rank i; row j of the result came from rank j. Shape ``[size, ...]`` both ways."""
        assert send.shape[0] == self.size
        assert send.is_contiguous()
        self.traffic.add("all_to_all", self._bytes_for_others(send))
        return self._all_to_all(send)

    def all_to_all_side_by_side(self, send: Tensor) -> Tensor:
        """As ``all_to_all``, of ``[size, B, T, ...]``; the result is ``[B, size T, ...]``, rank j's at token j T."""
        assert send.shape[0] == self.size
        assert send.is_contiguous()
        self.traffic.add("all_to_all", self._bytes_for_others(send))
        return self._all_to_all_side_by_side(send)

    def all_to_all_joined(self, send: Tensor) -> Tensor:
        """As ``all_to_all``, of ``[B, size T, h, D]``, T tokens for each rank; the result is ``[B, T, size h, D]``,
        rank j's at head j h."""
        self.traffic.add("all_to_all", self._bytes_for_others(send))
        return self._all_to_all_joined(send)

    def all_to_all_columns(self, memory_BTW: Tensor, columns: Sequence[Sequence[slice]]) -> list[Tensor]:
        """Of a send buffer [B, T, W], the columns ``columns[i]`` go to rank i. For each of this rank's own, in order,
        what all ranks have there: [B, size T, *], rank j's at token j T. Only where ``trades_columns``."""
        widths = [sum(c.stop - c.start for c in those) for those in columns]
        self.traffic.add("all_to_all", memory_BTW[..., 0].nbytes * (sum(widths) - widths[self.rank]))
        return self._all_to_all_columns(memory_BTW, columns)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's ``tensor``, the same on all; ``tensor`` itself may be overwritten with it.

        A ring all-reduce over n ranks makes each send 2 (n-1)/n of the tensor; that is what is counted.
        """
        assert tensor.is_contiguous()
        self.traffic.add("all_reduce", tensor.nbytes * 2 * (self.size - 1) // self.size)
        return self._all_reduce(tensor)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Every rank's ``tensor``, stacked: ``[size, ...]``."""
        tensor = tensor.contiguous()
        self.traffic.add("all_gather", tensor.nbytes * (self.size - 1))
        return self._all_gather(tensor)

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """Rank ``source``'s ``tensor`` on every rank; the others bring one of the same shape and dtype."""
        tensor = tensor.contiguous()
        if self.size == 1:
            return tensor
        self.traffic.add("broadcast", tensor.nbytes * (self.size - 1) if self.rank == source else 0)
        return self._broadcast(tensor, source)

    def _bytes_for_others(self, send: Tensor) -> int:
        """Of a tensor that is equal parts for all ranks."""
        return send.nbytes * (self.size - 1) // self.size

    def agree(self, **facts: object) -> None:
        """Raise the same DisagreementError on every rank unless all hold the same facts; it names one and a rank."""
        own = {name: str(value) for name, value in facts.items()}
        everyone = self.all_gather_objects((own, f" ({self.place})" if self.place else ""))
        first, first_place = everyone[0]
        for rank, (other, place) in enumerate(everyone):
            # In an order of their own: that of a set of strings is another in every process.
            for name in {**first, **other}:
                if first.get(name) != other.get(name):
                    raise DisagreementError(
                        f"ranks disagree on {name}: rank 0{first_place} has {first.get(name)}, rank {rank}{place} has "
                        f"{other.get(name)}; make it the same on all ranks"
                    )

    @contextmanager
    def together(self, waiting: AbstractContextManager[None] | None = None) -> Iterator[None]:
        """Collective: no rank goes on before all are through with the block, and where it fails on one it fails on all.

        A rank that failed raises its own error, the others repeat the first such rank's: what a user can put right as
        an error of that kind, all else as a TransportError. Inside nobody may wait for what a peer that fails leaves
        undone.

        Args:
            waiting: is entered while this rank waits for the others.
        """
        waiting = waiting or nullcontext()
        try:
            yield
        except Exception as error:
            named = isinstance(error, TransportError)
            told = (_kind_to_repeat(error), reason_of(error) if named else f"rank {self.rank}: {reason_of(error)}")
            with waiting:
                self.all_gather_objects(told)
            raise
        with waiting:
            everyone: list[tuple[str, str] | None] = self.all_gather_objects(None)
        for failed in everyone:
            if failed is not None:
                raise _KINDS[failed[0]](failed[1])

    def all_gather_objects(self, value: T) -> list[T]:
        """Every rank's small Python value, in rank order; of the kinds that ``wire`` can send."""
        return [wire.decode(data) for data in self._all_gather_bytes(wire.encode(value))]

    @abstractmethod
    def _all_gather_bytes(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, in rank order; lengths may differ."""

    @abstractmethod
    def barrier(self) -> None: ...

    @abstractmethod
    def _exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending: ...

    @abstractmethod
    def _all_to_all(self, send: Tensor) -> Tensor: ...

    def _all_to_all_side_by_side(self, send: Tensor) -> Tensor:
        size, batch, tokens, *rest = send.shape
        return self._all_to_all(send).transpose(0, 1).reshape(batch, size * tokens, *rest)

    def _all_to_all_joined(self, send: Tensor) -> Tensor:
        parts = send.unflatten(1, (self.size, -1)).transpose(0, 1).contiguous()
        # Contiguous, as of a single head a rank a reshape would not be: models may take the result as a view.
        return self._all_to_all(parts).permute(1, 2, 0, 3, 4).contiguous().flatten(2, 3)

    def _all_to_all_columns(self, memory_BTW: Tensor, columns: Sequence[Sequence[slice]]) -> list[Tensor]:
        raise NotImplementedError

    @abstractmethod
    def _all_reduce(self, tensor: Tensor) -> Tensor: ...

    @abstractmethod
    def _all_gather(self, tensor: Tensor) -> Tensor: ...

    def _broadcast(self, tensor: Tensor, source: int) -> Tensor:
        return self._all_gather(tensor)[source]
