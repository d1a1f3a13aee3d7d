"""Transport among threads of one process: a world of many ranks without launching any, for tests.

It is stricter than a network. A message is copied only when its receiver waits for it, so a sender that reuses the
buffer too early is caught, not hidden; shapes and dtypes must match; a peer that never answers is named.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

from ds_ring.errors import TransportError
from ds_ring.transport.base import Message, Pending, Transport

T = TypeVar("T")


@dataclass(eq=False)
class _Parcel:
    """``done`` is set when its receiver has copied it (``taken``), or will not."""

    tensor: Tensor
    taken: bool = False
    done: threading.Event = field(default_factory=threading.Event)


class _Group:
    """What the ranks of one group share."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.size, self.timeout_s = size, timeout_s
        self.mailboxes: dict[tuple[int, int], SimpleQueue[_Parcel | None]] = {
            (a, b): SimpleQueue() for a in range(size) for b in range(size)
        }
        self.slots: list[object] = [None] * size
        self.barrier = threading.Barrier(size)
        self.abandoned = False
        self._sent: WeakSet[_Parcel] = WeakSet()
        self._lock = threading.Lock()

    def send(self, source: int, target: int, tensor: Tensor) -> _Parcel:
        parcel = _Parcel(tensor)
        with self._lock:
            self._sent.add(parcel)
            self.mailboxes[source, target].put(parcel)
            if self.abandoned:
                parcel.done.set()
        return parcel

    def abandon(self) -> None:
        """A rank failed: nobody waits for another rank any longer."""
        with self._lock:
            self.abandoned = True
            self.barrier.abort()
            for mailbox in self.mailboxes.values():
                mailbox.put(None)
            for parcel in self._sent:
                parcel.done.set()

    def wait_for_all(self) -> None:
        try:
            self.barrier.wait(self.timeout_s)
        except threading.BrokenBarrierError:
            raise TransportError(f"a rank of this group of {self.size} did not reach the collective") from None


class ThreadedWorld:
    """``size`` ranks as threads. Groups are made on first use and shared by the ranks that name them."""

    def __init__(self, size: int, timeout_s: float = 300.0) -> None:
        self.size, self.timeout_s = size, timeout_s
        self._groups: dict[tuple[str, tuple[int, ...]], _Group] = {}
        self._lock = threading.Lock()
        self._failed = False

    def transport(self, axis: str, ranks: Sequence[int], rank: int) -> ThreadedTransport:
        """The transport of global ``rank`` in the group ``ranks`` along ``axis``."""
        with self._lock:
            group = self._groups.setdefault((axis, tuple(ranks)), _Group(len(ranks), self.timeout_s))
            if self._failed and not group.abandoned:
                group.abandon()
        return ThreadedTransport(group, list(ranks).index(rank))

    def run(self, work: Callable[[int], T]) -> list[T]:
        """``work(rank)`` on every rank at once; results in rank order, or the first error of any rank."""
        errors: list[BaseException] = []

        def one(rank: int) -> T:
            try:
                with torch.inference_mode():
                    return work(rank)
            except BaseException as error:
                with self._lock:
                    errors.append(error)
                    self._failed = True
                    for group in self._groups.values():
                        group.abandon()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            futures = [pool.submit(one, rank) for rank in range(self.size)]
        # As they failed; who failed for want of a peer comes second: the cause is the peer's own error.
        errors.sort(key=lambda e: isinstance(e, TransportError))
        if errors:
            raise errors[0]
        return [f.result() for f in futures]


class _Exchange:
    def __init__(self, transport: ThreadedTransport, sent: list[_Parcel], receives: Sequence[Message]) -> None:
        self._transport, self._sent, self._receives = transport, sent, receives

    def wait(self) -> None:
        for peer, target in self._receives:
            self._transport.take(peer, target)
        for parcel in self._sent:
            if not parcel.done.wait(self._transport.timeout_s) or not parcel.taken:
                raise TransportError(f"rank {self._transport.rank}: a message was never received")
        self._sent, self._receives = [], ()


class ThreadedTransport(Transport):
    def __init__(self, group: _Group, rank: int) -> None:
        super().__init__(rank, group.size)
        self._group = group
        self.timeout_s = group.timeout_s

    def _exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        return _Exchange(self, [self._group.send(self.rank, peer, tensor) for peer, tensor in sends], receives)

    @property
    def abandoned(self) -> bool:
        """Whether a rank failed, so that there may be no answer."""
        return self._group.abandoned

    def take(self, peer: int, target: Tensor) -> None:
        """Copy the next message from ``peer`` into ``target``."""
        try:
            parcel = self._group.mailboxes[peer, self.rank].get(timeout=self.timeout_s)
        except Empty:
            raise TransportError(f"rank {self.rank}: no message from rank {peer} in {self.timeout_s} s") from None
        if parcel is None:
            raise TransportError(f"rank {self.rank}: no message from rank {peer}, as a rank failed")
        source = parcel.tensor
        if (source.shape, source.dtype) != (target.shape, target.dtype):
            raise TransportError(
                f"rank {self.rank} expects {tuple(target.shape)} {target.dtype} from rank {peer}, "
                f"which sent {tuple(source.shape)} {source.dtype}"
            )
        target.copy_(source)
        parcel.taken = True
        parcel.done.set()

    def _all_to_all(self, send: Tensor) -> Tensor:
        sent = self._swap(send)
        received = torch.stack([tensor[self.rank] for tensor in sent])
        self._group.wait_for_all()
        return received

    def _all_reduce(self, tensor: Tensor) -> Tensor:
        total = torch.stack(self._swap(tensor)).sum(
            0, dtype=tensor.dtype
        )  # in rank order everywhere: all ranks get the same bits
        self._group.wait_for_all()
        return total

    def _all_gather(self, tensor: Tensor) -> Tensor:
        gathered = torch.stack(self._swap(tensor))
        self._group.wait_for_all()
        return gathered

    def _all_gather_bytes(self, data: bytes) -> list[bytes]:
        return self.hand_round(data)

    def hand_round(self, value: T) -> list[T]:
        """Every rank's ``value`` itself, in rank order: what threads can do and processes cannot."""
        self._group.slots[self.rank] = value
        self._group.wait_for_all()
        values: list[T] = list(self._group.slots)  # type: ignore[arg-type]
        self._group.wait_for_all()
        return values

    def barrier(self) -> None:
        self._group.wait_for_all()

    def _swap(self, tensor: Tensor) -> list[Tensor]:
        self._group.slots[self.rank] = tensor
        self._group.wait_for_all()
        tensors = [t for t in self._group.slots if isinstance(t, Tensor)]
        if any((t.shape, t.dtype) != (tensor.shape, tensor.dtype) for t in tensors):
            shapes = [tuple(t.shape) for t in tensors]
            raise TransportError(f"ranks bring unequal tensors to a collective: {shapes}")
        return tensors
