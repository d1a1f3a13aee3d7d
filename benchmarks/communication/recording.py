"""Transports that move what they are asked to, and keep a journal of how to move as much again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from torch import Tensor

from benchmarks.communication.journal import Journal, blanks
from benchmarks.communication.wrapped import WrappedTransport
from ds_ring.transport.base import Message, Pending, Transport
from ds_ring.transport.copy_engine import CopyEngineTransport, PulledTensor
from ds_ring.transport.shared import PeerPart, SharedTensor, ViewOf


class RecordedTransport(WrappedTransport):
    """What is done again is the transfer: not what ``inner``, or whoever called it, copies before and after."""

    def __init__(self, inner: Transport, journal: Journal) -> None:
        super().__init__(inner)
        self.journal = journal

    def _exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        peers, alike = [peer for peer, _ in (*sends, *receives)], blanks(*(t for _, t in (*sends, *receives)))
        count, real = len(sends), self.real

        def again() -> None:
            messages = list(zip(peers, alike(), strict=True))
            real._exchange(messages[:count], messages[count:]).wait()

        self.journal.append(again)
        return self.inner._exchange(sends, receives)

    def _all_to_all(self, send: Tensor) -> Tensor:
        self._record(self.real._all_to_all, send)
        return self.inner._all_to_all(send)

    def _all_reduce(self, tensor: Tensor) -> Tensor:
        self._record(self.real._all_reduce, tensor)
        return self.inner._all_reduce(tensor)

    def _all_gather(self, tensor: Tensor) -> Tensor:
        self._record(self.real._all_gather, tensor)
        return self.inner._all_gather(tensor)

    def _broadcast(self, tensor: Tensor, source: int) -> Tensor:
        self._record(lambda alike: self.real._broadcast(alike, source), tensor)
        return self.inner._broadcast(tensor, source)

    def _record(self, move: Callable[[Tensor], object], tensor: Tensor) -> None:
        alike = blanks(tensor)
        self.journal.append(lambda: move(alike()[0]))


class RecordedCopyEngine(RecordedTransport):
    """Done again, an all-to-all's send buffer is filled only where it was filled by the transport."""

    @property
    def real(self) -> CopyEngineTransport:
        return cast(CopyEngineTransport, super().real)

    def share(self, shape: Sequence[int], like: Tensor, within: ViewOf | None = None) -> SharedTensor:
        shared = RecordedTensor(self.inner.share(shape, like, within))
        outgoing, incoming, dtype, device = shared.outgoing, shared.incoming, like.dtype, like.device

        def again() -> None:
            with PulledTensor(self.real, tuple(shape), dtype, device, within) as once_more:
                once_more.give(outgoing)
                for pending, _ in [once_more.pull(part) for part in incoming]:
                    pending.wait()

        self.journal.append(again)
        return shared

    def _all_to_all_side_by_side(self, send: Tensor) -> Tensor:
        self._record(self.real._all_to_all, send)
        return self.inner._all_to_all_side_by_side(send)

    def _all_to_all_joined(self, send: Tensor) -> Tensor:
        self._record_unfilled(self.real._all_to_all_joined, send)
        return self.inner._all_to_all_joined(send)

    def _all_to_all_columns(self, memory_BTW: Tensor, columns: Sequence[Sequence[slice]]) -> list[Tensor]:
        self._record_unfilled(lambda memory: self.real._all_to_all_columns(memory, columns), memory_BTW)
        return self.inner._all_to_all_columns(memory_BTW, columns)

    def _record_unfilled(self, move: Callable[[Tensor], object], send: Tensor) -> None:
        shape, like = tuple(send.shape), send.new_empty(0)
        self.journal.append(lambda: move(self.real.send_buffer(shape, like)))


class RecordedTensor(SharedTensor):
    """``inner``, and what this rank gives and takes of it, which is known when it is closed."""

    def __init__(self, inner: SharedTensor) -> None:
        self._inner = inner
        self.own, self.memory, self.puts = inner.own, inner.memory, inner.puts
        self.outgoing: list[PeerPart | None] = []
        self.incoming: list[PeerPart | None] = []

    def publish(self, outgoing: Sequence[PeerPart | None]) -> None:
        self.outgoing += outgoing
        self._inner.publish(outgoing)

    def pull(self, incoming: PeerPart | None) -> tuple[Pending, Tensor]:
        self.incoming.append(incoming)
        return self._inner.pull(incoming)

    def room(self, shape: Sequence[int]) -> Tensor:
        return self._inner.room(shape)

    def pull_into(self, incoming: PeerPart, targets: Sequence[Tensor], dim: int) -> Pending:
        self.incoming.append(incoming)
        return self._inner.pull_into(incoming, targets, dim)

    def close(self) -> None:
        self._inner.close()


def recorded_transport(inner: Transport, journal: Journal) -> RecordedTransport:
    real = inner.real if isinstance(inner, WrappedTransport) else inner
    return (RecordedCopyEngine if isinstance(real, CopyEngineTransport) else RecordedTransport)(inner, journal)
