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
from ds_ring.transport.base import Done, Message, Transport
from ds_ring.transport.peer_buffers import MIN_BUFFERS, BufferPool, PeerBuffer, nbytes, pieces
from ds_ring.transport.peer_memory import Device
from ds_ring.transport.shared import PeerPart, Pending, SharedTensor, ViewOf


class CopyEngineTransport(Transport):
    """Shared tensors and all-to-alls by copy engine; messages of other kinds, and agreement, by ``control``."""

    name = "copy engine"
    overlaps = trades_columns = True

    def __init__(self, control: Transport, device: Device) -> None:
        super().__init__(control.rank, control.size)
        self._control, self.device = control, device
        self.buffers = BufferPool(device, self.rank, self.size)
        self._lent: dict[int, PeerBuffer] = {}

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
        for pending in [shared.pull_into((peer, (slice(None),)), [parts[peer]], 0) for peer in peers]:
            pending.wait()
        return [peer for peer in peers if not bool((parts[peer] == 100.0 * peer + number).all())]

    def reserve(self, shapes: Sequence[Sequence[int]], like: Tensor) -> None:
        self.buffers.reserve(max(nbytes(tuple(shape), like.dtype) for shape in shapes))

    def share(self, shape: Sequence[int], like: Tensor, within: ViewOf | None = None) -> SharedTensor:
        return PulledTensor(self, tuple(shape), like.dtype, like.device, within)

    def send_buffer(self, shape: Sequence[int], like: Tensor) -> Tensor:
        buffer = self.buffers.acquire(nbytes(tuple(shape), like.dtype))
        own = buffer.view(self.rank, tuple(shape), like.dtype)
        self._lent[own.data_ptr()] = buffer
        return own

    def _all_gather_bytes(self, data: bytes) -> list[bytes]:
        return self._control._all_gather_bytes(data)

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
        received = torch.empty_like(send)
        self._swap(send, self._for_us, [[part] for part in received.unbind(0)])
        return received

    def _all_to_all_side_by_side(self, send: Tensor) -> Tensor:
        size, batch, *shape = send.shape
        received = send.new_empty((batch, size, *shape))
        self._swap(send, self._for_us, [[part] for part in received.unbind(1)])
        return received.flatten(1, 2)

    def _for_us(self, send: Tensor) -> list[Tensor]:
        return [send[self.rank]]

    def _all_to_all_joined(self, send: Tensor) -> Tensor:
        batch, tokens, *heads = send.shape
        received = send.new_empty((batch, tokens // self.size, self.size, *heads))
        self._swap(
            send,
            lambda memory: [memory.unflatten(1, (self.size, -1))[:, self.rank]],
            [[part] for part in received.unbind(2)],
        )
        return received.flatten(2, 3)

    def _all_to_all_columns(self, memory_BTW: Tensor, columns: Sequence[Sequence[slice]]) -> list[Tensor]:
        batch, tokens, _ = memory_BTW.shape
        own = columns[self.rank]
        received = [memory_BTW.new_empty((batch, self.size, tokens, those.stop - those.start)) for those in own]
        self._swap(
            memory_BTW,
            lambda memory: [memory[..., those] for those in own],
            [[block[:, peer] for block in received] for peer in range(self.size)],
        )
        return [block.flatten(1, 2) for block in received]

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
    """A shared tensor in a buffer."""

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
        whole = within.shape if within else shape
        self._buffer = transport.buffers.acquire(nbytes(whole, dtype))
        self.memory = self._buffer.view(transport.rank, whole, dtype)
        self.own = self._part(self.memory)

    def publish(self, outgoing: Sequence[PeerPart | None]) -> None:
        self._transport.traffic.add("exchange", sum(self.own[part[1]].nbytes for part in outgoing if part))
        self.give(outgoing)

    def give(self, outgoing: Sequence[PeerPart | None]) -> None:
        """``publish`` without counting it."""
        self._transport.buffers.publish(self._buffer, [part[0] for part in outgoing if part])

    def pull(self, incoming: PeerPart | None) -> tuple[Pending, Tensor]:
        part = self.blank_part(incoming)
        return (Done() if incoming is None else self.pull_into(incoming, [part], 0)), part

    def room(self, shape: Sequence[int]) -> Tensor:
        return self.own.new_empty(tuple(shape))

    def pull_into(self, incoming: PeerPart, targets: Sequence[Tensor], dim: int) -> Pending:
        (peer, index), (shape, dtype, _, within) = incoming, self._like
        source = self._part(self._buffer.view(peer, within.shape if within else shape, dtype))[index]
        parts = source.split([target.shape[dim] for target in targets], dim)
        pairs = chain.from_iterable(map(pieces, targets, parts))
        return self._transport.buffers.pull(self._buffer, peer, pairs)

    def close(self) -> None:
        self._transport.buffers.release(self._buffer)

    def _part(self, memory: Tensor) -> Tensor:
        shape, _, _, within = self._like
        return within.part(memory, shape) if within else memory
