"""Transport within one host: ranks read each other's memory with the GPUs' copy engines, beside the kernels.

A copy engine uses no SM, so that a transfer costs a matrix product beside it almost nothing, where NCCL's kernels take
SMs from it. Nothing meets as a whole group, and nothing is multicast: who signals what to whom, and when memory may be
written again, is the protocol in ``peer_buffers.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor

from ds_ring.errors import TransportError
from ds_ring.transport.base import Done, Message, T, Transport, void
from ds_ring.transport.peer_buffers import MIN_BUFFERS, BufferPool, PeerBuffer, nbytes, pieces
from ds_ring.transport.peer_memory import Device
from ds_ring.transport.shared import PeerPart, Pending, SharedTensor, ViewOf


class CopyEngineTransport(Transport):
    """Shared tensors and all-to-alls by copy engine; messages of other kinds, and agreement, by ``control``."""

    name = "copy engine"
    overlaps = trades_columns = True

    def __init__(self, control: Transport, device: Device) -> None:
        super().__init__(control.rank, control.size)
        self._control = control
        self.buffers = BufferPool(device, self.rank, self.size)
        self._lent: dict[int, PeerBuffer] = {}
        self._stand_ins: dict[tuple[object, ...], Tensor] = {}

    @property
    def shared_bytes(self) -> int:
        return self.buffers.nbytes

    def self_test(self, device: torch.device) -> None:
        """A few rounds of numbers that are known, on all ranks together, before anything that counts.

        Raises:
            TransportError: on every rank, if one read something else than what a peer wrote, or failed in another way,
                which it raises itself as it is.
        """
        within = ViewOf((512, 6), (6, 1), 2)
        self.buffers.reserve(nbytes(within.shape, torch.float32))
        with PulledTensor(self, (512, 2), torch.float32, device) as shared:
            # Step by step: the streams of peers would wait for ever for a flag that a rank cannot raise.
            with self.together():
                self._write(shared, 0)
            with self.together():
                wrong = self._misread(shared, 0)
        with self.together():
            for number in range(1, 2 * MIN_BUFFERS):
                part_of = within if number % 2 else None
                with PulledTensor(self, (512, 2), torch.float32, device, part_of) as shared:
                    self._write(shared, number)
                    wrong += self._misread(shared, number)
            # Not before: whatever this rank reads, peers wait for its flags.
            if wrong:
                raise TransportError(f"rank {self.rank} does not read what rank {wrong[0]} wrote into its memory")

    def _write(self, shared: PulledTensor, number: int) -> None:
        """This rank's part of a round of the self-test, for all peers."""
        shared.memory.fill_(torch.nan)
        shared.own.fill_(100.0 * self.rank + number)
        shared.give([(peer, (slice(None),)) for peer in range(self.size) if peer != self.rank])

    def _misread(self, shared: PulledTensor, number: int) -> list[int]:
        """The peers of whose parts something else arrives."""
        peers = [(self.rank + hop) % self.size for hop in range(1, self.size)]
        parts = shared.own.new_full((512, self.size, 4), torch.nan)[..., 1:3].unbind(1)
        for pending in [shared._take_into((peer, (slice(None),)), [parts[peer]], 0) for peer in peers]:
            pending.wait()
        return [peer for peer in peers if not bool((parts[peer] == 100.0 * peer + number).all())]

    def reserve(self, shapes: Sequence[Sequence[int]], like: Tensor) -> None:
        if not self.muted:
            self.buffers.reserve(max(nbytes(tuple(shape), like.dtype) for shape in shapes))

    def share(self, shape: Sequence[int], like: Tensor, within: ViewOf | None = None) -> SharedTensor:
        shared = PulledTensor(self, tuple(shape), like.dtype, like.device, within)
        if not self.muted:
            self._stand_ins.clear()
        self.traffic.add("exchange", 0, shared.again())
        return shared

    def send_buffer(self, shape: Sequence[int], like: Tensor) -> Tensor:
        if self.muted:
            return super().send_buffer(shape, like)
        buffer = self.buffers.acquire(nbytes(tuple(shape), like.dtype))
        own = buffer.view(self.rank, tuple(shape), like.dtype)
        self._lent[own.data_ptr()] = buffer
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

    def all_to_all_side_by_side(self, send: Tensor) -> Tensor:
        if self.muted:
            return super().all_to_all_side_by_side(send)
        self._account_all_to_all(send)
        size, batch, *shape = send.shape
        received = send.new_empty((batch, size, *shape))
        self._swap(send, self._for_us, [[part] for part in received.unbind(1)])
        return received.flatten(1, 2)

    def all_to_all_joined(self, send: Tensor) -> Tensor:
        shape, like = tuple(send.shape), send.new_empty(0)
        sent = send.nbytes * (self.size - 1) // self.size
        self.traffic.add("all_to_all", sent, lambda: void(self._take_rows(self.send_buffer(shape, like))))
        if not self.muted:
            self._stand_ins.clear()
            return self._take_rows(send)
        return self._as_if_all(self._rows_for_us(send), 2)

    def _take_rows(self, send: Tensor) -> Tensor:
        batch, rows, *heads = send.shape
        received = send.new_empty((batch, rows // self.size, self.size, *heads))
        targets = [[part] for part in received.unbind(2)]
        self._swap(send, lambda memory: [self._rows_for_us(memory)], targets)
        return received.flatten(2, 3)

    def _rows_for_us(self, memory: Tensor) -> Tensor:
        return memory.unflatten(1, (self.size, -1))[:, self.rank]

    def _for_us(self, send: Tensor) -> list[Tensor]:
        return [send[self.rank]]

    def _all_to_all(self, send: Tensor) -> Tensor:
        received = torch.empty_like(send)
        self._swap(send, self._for_us, [[part] for part in received.unbind(0)])
        return received

    def all_to_all_columns(self, memory_BTW: Tensor, columns: Sequence[Sequence[slice]]) -> list[Tensor]:
        shape, like = tuple(memory_BTW.shape), memory_BTW.new_empty(0)
        own, widths = columns[self.rank], [sum(c.stop - c.start for c in those) for those in columns]
        sent = memory_BTW[..., 0].nbytes * (sum(widths) - widths[self.rank])
        self.traffic.add("all_to_all", sent, lambda: void(self._take_columns(self.send_buffer(shape, like), own)))
        if not self.muted:
            self._stand_ins.clear()
            return self._take_columns(memory_BTW, own)
        return [self._as_if_all(memory_BTW[..., those], 1, number) for number, those in enumerate(own)]

    def _take_columns(self, memory_BTW: Tensor, own: Sequence[slice]) -> list[Tensor]:
        batch, rows, _ = memory_BTW.shape
        received = [memory_BTW.new_empty((batch, self.size, rows, those.stop - those.start)) for those in own]
        self._swap(
            memory_BTW,
            lambda memory: [memory[..., those] for those in own],
            [[block[:, peer] for block in received] for peer in range(self.size)],
        )
        return [block.flatten(1, 2) for block in received]

    def _as_if_all(self, own: Tensor, dim: int, number: int = 0) -> Tensor:
        """While muted: ``own`` among parts that stand in for its like of all ranks, side by side along ``dim``."""
        parts = self.stand_in((*own.shape[:dim], self.size, *own.shape[dim:]), own, number)
        parts.select(dim, self.rank).copy_(own)
        return parts.flatten(dim, dim + 1)

    def stand_in(self, shape: Sequence[int], own: Tensor, number: int = 0) -> Tensor:
        """While muted, for what peers would bring: numbers of this rank's ``own``, of an earlier call. On garbage or
        zeros arithmetic takes another time, and a copy would take its own."""
        key = number, tuple(shape), own.dtype
        if key not in self._stand_ins:
            size = torch.Size(shape).numel()
            times = -(-size // own.numel())
            self._stand_ins[key] = own.reshape(-1).repeat(times)[:size].view(tuple(shape))
        return self._stand_ins[key]

    def _swap(
        self, send: Tensor, wanted: Callable[[Tensor], Sequence[Tensor]], targets: Sequence[Sequence[Tensor]]
    ) -> None:
        """What is ``wanted`` of rank j's ``send`` into ``targets[j]``. Where ours is a send buffer it is not copied
        first."""
        buffer = self._lent.pop(send.data_ptr(), None)
        if buffer is None:
            buffer = self.buffers.acquire(send.nbytes)
            buffer.view(self.rank, tuple(send.shape), send.dtype).copy_(send)
        self.meet_lanes()
        peers = [(self.rank - hop) % self.size for hop in range(1, self.size)]
        self.buffers.publish(buffer, peers)
        pendings = []
        for peer in peers:
            sources = wanted(buffer.view(peer, tuple(send.shape), send.dtype))
            pairs = chain.from_iterable(map(pieces, targets[peer], sources))
            pendings.append(self.buffers.pull(buffer, peer, pairs))
        for target, source in zip(targets[self.rank], wanted(send), strict=True):
            target.copy_(source)
        self.yield_lane()
        for pending in pendings:
            pending.wait()
        self.buffers.release(buffer)


class PulledTensor(SharedTensor):
    """A shared tensor in a buffer; while its transport is muted, ordinary memory, and this rank's own parts stand for
    its peers'."""

    puts = True

    def __init__(
        self,
        transport: CopyEngineTransport,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        within: ViewOf | None = None,
    ) -> None:
        self._transport, self._like = transport, (shape, dtype, device, within)
        self._buffer: PeerBuffer | None = None
        whole = within.shape if within else shape
        if transport.muted:
            self.memory = torch.empty(whole, dtype=dtype, device=device)
        else:
            self._buffer = transport.buffers.acquire(nbytes(whole, dtype))
            self.memory = self._buffer.view(transport.rank, whole, dtype)
        self.own = self._part(self.memory)
        self._outgoing: list[PeerPart | None] = []
        self._incoming: list[PeerPart | None] = []

    def again(self) -> Callable[[], None]:
        """Does this round once more, uncounted. What it moves is known when the round is through."""
        transport, like = self._transport, self._like
        outgoing, incoming = self._outgoing, self._incoming

        def replay() -> None:
            with PulledTensor(transport, *like) as shared:
                shared.give(outgoing)
                for pending, _ in [shared.take(part) for part in incoming]:
                    pending.wait()

        return replay

    def publish(self, outgoing: Sequence[PeerPart | None]) -> None:
        self._outgoing += outgoing
        sent = sum(self.own[part[1]].nbytes for part in outgoing if part)
        self._transport.traffic.bytes_by_op["exchange"] += sent
        self.give(outgoing)

    def pull(self, incoming: PeerPart | None) -> tuple[Pending, Tensor]:
        self._incoming.append(incoming)
        return self.take(incoming)

    def room(self, shape: Sequence[int]) -> Tensor:
        if self._buffer is None:
            return self._transport.stand_in(shape, self.own)
        return self.own.new_empty(tuple(shape))

    def pull_into(self, incoming: PeerPart, targets: Sequence[Tensor], dim: int) -> Pending:
        self._incoming.append(incoming)
        return self._take_into(incoming, targets, dim)

    def give(self, outgoing: Sequence[PeerPart | None]) -> None:
        if self._buffer is not None:
            self._transport.buffers.publish(self._buffer, [part[0] for part in outgoing if part])

    def take(self, incoming: PeerPart | None) -> tuple[Pending, Tensor]:
        if incoming is not None and self._buffer is None:
            return Done(), self.own[incoming[1]]
        part = self.blank_part(incoming)
        return (Done() if incoming is None else self._take_into(incoming, [part], 0)), part

    def _take_into(self, incoming: PeerPart, targets: Sequence[Tensor], dim: int) -> Pending:
        if self._buffer is None:
            return Done()
        (peer, index), (shape, dtype, _, within) = incoming, self._like
        source = self._part(self._buffer.view(peer, within.shape if within else shape, dtype))[index]
        parts = source.split([target.shape[dim] for target in targets], dim)
        pairs = chain.from_iterable(map(pieces, targets, parts))
        return self._transport.buffers.pull(self._buffer, peer, pairs)

    def _part(self, memory: Tensor) -> Tensor:
        shape, _, _, within = self._like
        return within.part(memory, shape) if within else memory

    def close(self) -> None:
        if self._buffer is not None:
            self._transport.buffers.release(self._buffer)
        self._buffer = None
