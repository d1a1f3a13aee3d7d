"""Transport within one host: ranks read each other's memory with the GPUs' copy engines, beside the kernels.

A copy engine uses no SM, so that a transfer costs a matrix product beside it almost nothing, where NCCL's kernels take
SMs from it. Nothing meets as a whole group, and nothing is multicast.

**The protocol.** Shared tensors lie in *slots*, each one ``PeerMemory`` on every rank; all ranks use slots in the same
order. Using a slot once is a *round*, numbered 1, 2, .. in each slot. A slot has two flags for every peer p:

- WRITTEN + p, in my memory: p's slot holds what p wrote in that round. Raised by p.
- READ + p, in my memory: p has taken what it wanted from my slot in that round. Raised by p.

Round n of a slot, on every rank (C: the queue of computations, P: the queue for one peer):

1. acquire: C waits for READ + p >= m, for every peer p that was to read in the last published round m < n.
   Only then may the slot be written.
2. write, on C.
3. publish: C raises WRITTEN + me to n at every reader.
4. pull from p: P goes behind C (the target's memory is free), waits for WRITTEN + p >= n, copies, and raises READ + me
   to n at p. What uses the copy, on C, goes behind P.
5. release: the slot may be acquired again. This rank's own reading of it is on C, as is the writing of a later round.

Why that is enough. A slot is overwritten only behind (1), when all readers' copies are done. A copy starts only behind
(3) and so behind the writing, and sees round n, not a later one: p cannot write a later round before we raise READ.
Flags only rise, so that no signal is lost or taken for another, however far one rank runs ahead; it can run at most
as far as the slots go. Readers and pulls are both derived from the layout and must agree: a pull that was not
published waits for ever, a reader that does not pull stops the writer. All waits are for things that the waited-for
rank queued earlier in the common order of operations, so that there is no cycle, even where a GPU runs unrelated
streams in one hardware queue.

At least two slots are used in turn, so that the next layer's tensor is written while peers still read this one's. A
slot that is too small is replaced by all ranks together (shapes are equal on all); nothing is in flight then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ds_ring.transport.base import Done, Message, T, Transport
from ds_ring.transport.peer_memory import Device, PeerMemory
from ds_ring.transport.shared import Part, Pending, Shared

MIN_SLOTS = 2


class Slot:
    """Memory that is used round after round; ``readers`` are those of the last published one."""

    def __init__(self, memory: PeerMemory) -> None:
        self.memory = memory
        self.round = 0
        self.published = 0
        self.readers: list[int] = []

    def view(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """``rank``'s tensor in this slot."""
        return self.memory.data(rank)[: nbytes(shape, dtype)].view(dtype).view(shape)


class Slots:
    """The slots of one group on this rank."""

    def __init__(self, device: Device, rank: int, size: int) -> None:
        self._device, self._rank, self._size = device, rank, size
        self._free: list[Slot] = []
        self.count = self.nbytes = 0

    def acquire(self, needed: int) -> Slot:
        """A slot of at least so many bytes that may be written."""
        if self._free and self.count >= MIN_SLOTS:
            slot = self._free.pop(0)
        else:
            self.count += 1
            slot = self._new(needed)
        if slot.memory.nbytes < needed:
            self.nbytes -= slot.memory.nbytes
            slot = self._new(needed)
        slot.round += 1
        queue = self._device.computations()
        for reader in slot.readers:
            queue.wait_flag(slot.memory, self._size + reader, slot.published)
        slot.readers = []
        return slot

    def publish(self, slot: Slot, readers: Sequence[int]) -> None:
        queue = self._device.computations()
        slot.readers, slot.published = list(readers), slot.round
        for reader in readers:
            queue.raise_flag(slot.memory, reader, self._rank, slot.round)

    def pull(self, slot: Slot, peer: int, pieces: Iterator[tuple[Tensor, Tensor]]) -> Pending:
        """Copy ``pieces`` (target, part of the peer's tensor) once the peer has published this round."""
        queue = self._device.pulls(peer)
        queue.after(self._device.computations())
        queue.wait_flag(slot.memory, peer, slot.round)
        for target, source in pieces:
            queue.copy(target, source)
        queue.raise_flag(slot.memory, peer, self._size + self._rank, slot.round)
        return queue.mark()

    def release(self, slot: Slot) -> None:
        self._free.append(slot)

    def _new(self, needed: int) -> Slot:
        slot = Slot(self._device.allocate(needed, 2 * self._size))
        self.nbytes += slot.memory.nbytes
        return slot


class CopyEngineTransport(Transport):
    """Shared tensors and all-to-alls by copy engine; messages of other kinds, and agreement, by ``control``."""

    name = "copy engine"
    overlaps = True

    def __init__(self, control: Transport, device: Device) -> None:
        super().__init__(control.rank, control.size)
        self._control = control
        self.slots = Slots(device, self.rank, self.size)
        self._lent: dict[int, Slot] = {}

    @property
    def shared_bytes(self) -> int:
        return self.slots.nbytes

    def share(self, shape: Sequence[int], like: Tensor) -> Shared:
        shared = PulledShared(self, tuple(shape), like.dtype, like.device)
        self.traffic.add("exchange", 0, shared.again())
        return shared

    def send_buffer(self, shape: Sequence[int], like: Tensor) -> Tensor:
        if self.muted:
            return super().send_buffer(shape, like)
        slot = self.slots.acquire(nbytes(tuple(shape), like.dtype))
        own = slot.view(self.rank, tuple(shape), like.dtype)
        self._lent[own.data_ptr()] = slot
        return own

    def all_gather_objects(self, value: T) -> list[T]:
        return self._control.all_gather_objects(value)

    def barrier(self) -> None:
        self._control.barrier()

    def _exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        return self._control._exchange(sends, receives)

    def _all_gather(self, tensor: Tensor) -> Tensor:
        return self._control._all_gather(tensor)

    def _all_reduce(self, tensor: Tensor) -> Tensor:
        return self._control._all_reduce(tensor)

    def _broadcast(self, tensor: Tensor, source: int) -> Tensor:
        return self._control._broadcast(tensor, source)

    def _all_to_all(self, send: Tensor) -> Tensor:
        slot = self._lent.pop(send.data_ptr(), None)
        if slot is None:
            slot = self.slots.acquire(send.nbytes)
            own = slot.view(self.rank, tuple(send.shape), send.dtype)
            own.copy_(send)
            send = own
        received = send.new_empty(send.shape)
        peers = [(self.rank - hop) % self.size for hop in range(1, self.size)]
        self.slots.publish(slot, peers)
        pendings = []
        for peer in peers:
            source = slot.view(peer, tuple(send.shape), send.dtype)[self.rank]
            pendings.append(self.slots.pull(slot, peer, iter([(received[peer], source)])))
        received[self.rank].copy_(send[self.rank])
        self.turn()
        for pending in pendings:
            pending.wait()
        self.slots.release(slot)
        return received


class PulledShared(Shared):
    """A shared tensor in a slot; while its transport is muted, ordinary memory that nobody reads."""

    def __init__(
        self, transport: CopyEngineTransport, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._transport, self._like = transport, (shape, dtype, device)
        self._slot: Slot | None = None
        if transport.muted:
            self.own = torch.empty(shape, dtype=dtype, device=device)
        else:
            self._slot = transport.slots.acquire(nbytes(shape, dtype))
            self.own = self._slot.view(transport.rank, shape, dtype)
        self._outgoing: list[Part | None] = []
        self._incoming: list[Part | None] = []

    def again(self) -> Callable[[], None]:
        """Does this round once more, uncounted. What it moves is known when the round is through."""
        transport, like = self._transport, self._like
        outgoing, incoming = self._outgoing, self._incoming

        def replay() -> None:
            with PulledShared(transport, *like) as shared:
                shared.give(outgoing)
                for pending, _ in [shared.take(part) for part in incoming]:
                    pending.wait()

        return replay

    def publish(self, outgoing: Sequence[Part | None]) -> None:
        self._outgoing += outgoing
        sent = sum(self.own[part[1]].nbytes for part in outgoing if part)
        self._transport.traffic.bytes_by_op["exchange"] += sent
        self.give(outgoing)

    def pull(self, incoming: Part | None) -> tuple[Pending, Tensor]:
        self._incoming.append(incoming)
        return self.take(incoming)

    def give(self, outgoing: Sequence[Part | None]) -> None:
        if self._slot is not None:
            self._transport.slots.publish(self._slot, [part[0] for part in outgoing if part])

    def take(self, incoming: Part | None) -> tuple[Pending, Tensor]:
        part = self.blank_part(incoming)
        if incoming is None:
            return Done(), part
        if self._slot is None:
            part.normal_()  # arithmetic on garbage or zeros takes another time than on numbers
            return Done(), part
        peer, index = incoming
        source = self._slot.view(peer, *self._like[:2])[index]
        return self._transport.slots.pull(self._slot, peer, contiguous_pieces(part, source)), part

    def close(self) -> None:
        if self._slot is not None:
            self._transport.slots.release(self._slot)
        self._slot = None


def contiguous_pieces(target: Tensor, source: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The fewest pairs of parts of equal tensors that are whole memory on both sides: what an engine copies."""
    if target.is_contiguous() and source.is_contiguous():
        yield target, source
    else:
        for t, s in zip(target, source, strict=True):
            yield from contiguous_pieces(t, s)


def nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
