"""How a whole layer comes to be in a buffer: from the parts of it that the ranks of a group hold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor

from ds_ring.transport.base import Done, Transport
from ds_ring.transport.peer_buffers import pieces
from ds_ring.transport.peer_memory import Device, PeerMemory
from ds_ring.transport.shared import Pending
from ds_ring.weights.layer_layout import Entry, LayerLayout


class Parts(ABC):
    """This rank's parts of all layers, and the way to those of its peers."""

    def __init__(self, layouts: Sequence[LayerLayout], transport: Transport) -> None:
        self.layouts, self.transport = layouts, transport
        self.starts = [
            list(accumulate((layout.part_nbytes[rank] for layout in layouts), initial=0))
            for rank in range(transport.size)
        ]

    @property
    def shared_bytes(self) -> int:
        """Memory that peers can read, which is apart from what PyTorch's allocator counts."""
        return 0

    @property
    @abstractmethod
    def memory(self) -> Tensor:
        """This rank's parts, uint8, layer after layer."""

    def own(self, layer: int, entry: Entry) -> Tensor:
        """This rank's part of a parameter."""
        return self._part(self.memory, layer, entry, self.transport.rank)

    @abstractmethod
    def start(self, layer: int, target: Tensor) -> Pending:
        """Begin to put the whole layer into ``target``, uint8, behind what is queued now. Where parts move as messages
        it is collective: in the same order on all ranks."""

    def _part(self, memory: Tensor, layer: int, entry: Entry, rank: int) -> Tensor:
        return entry.part(memory[self.starts[rank][layer] : self.starts[rank][layer + 1]], rank)


class PulledParts(Parts):
    """In memory that peers read: copy engines take what is missing. Parts never change, so nobody waits for a flag."""

    def __init__(self, layouts: Sequence[LayerLayout], transport: Transport, device: Device) -> None:
        super().__init__(layouts, transport)
        self._device = device
        # One size on all ranks; the parts of the last may be smaller.
        self._peers: PeerMemory = device.allocate(max(max(starts) for starts in self.starts) or 1, flags=1)

    @property
    def shared_bytes(self) -> int:
        return self._peers.nbytes

    @property
    def memory(self) -> Tensor:
        return self._peers.data(self.transport.rank)

    def start(self, layer: int, target: Tensor) -> Pending:
        rank, size = self.transport.rank, self.transport.size
        entries, marks = self.layouts[layer].entries, []
        # Each begins with its right neighbour, itself last: no memory is read by all at once.
        for peer in [(rank + hop) % size for hop in (*range(1, size), 0)]:
            queue, theirs = self._device.pulls(peer), self._peers.data(peer)
            queue.after(self._device.computations())
            pairs = ((e.cut.part(e.whole(target), peer), self._part(theirs, layer, e, peer)) for e in entries)
            for to, of in chain.from_iterable(pieces(to, of) for to, of in pairs if to.numel()):
                queue.copy(to, of)
            marks.append(queue.mark())
        own = self.layouts[layer].part_nbytes[rank]
        self.transport.traffic.add("weights", own * (size - 1))
        return _All(marks)


class SentParts(Parts):
    """Parts travel as messages, straight to where they belong; what is cut by columns is put in order on arrival.

    Args:
        on_host: parts are in the host's memory, and each rank takes its own from there first.
    """

    def __init__(
        self, layouts: Sequence[LayerLayout], transport: Transport, device: torch.device, on_host: bool = False
    ) -> None:
        super().__init__(layouts, transport)
        nbytes, cuda = self.starts[transport.rank][-1], device.type == "cuda"
        if on_host:
            self._memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=cuda)
        else:
            self._memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._stream = torch.cuda.Stream(device) if cuda else None

    @property
    def memory(self) -> Tensor:
        return self._memory

    def start(self, layer: int, target: Tensor) -> Pending:
        arriving = _Arriving(self, layer, target)
        if self._stream is None:  # waiting would hold the host
            arriving.begin()
            return arriving
        self._stream.wait_stream(torch.cuda.current_stream(target.device))
        with torch.cuda.stream(self._stream):
            arriving.begin()
            arriving.wait()
        return _Queued(self._stream)


class _Arriving:
    """A layer's parts under way."""

    def __init__(self, parts: SentParts, layer: int, target: Tensor) -> None:
        self._parts, self._layer, self._target = parts, layer, target
        self._pending: Pending = Done()

    def begin(self) -> None:
        transport = self._parts.transport
        rank, size = transport.rank, transport.size
        sends, receives = [], []
        for entry in self._parts.layouts[self._layer].entries:
            rooms = _rooms(entry, self._target, size)
            rooms[rank].copy_(self._parts.own(self._layer, entry), non_blocking=True)
            for hop in range(1, size):
                to, of = (rank + hop) % size, (rank - hop) % size
                sends += [(to, rooms[rank])] * bool(rooms[rank].numel())
                receives += [(of, rooms[of])] * bool(rooms[of].numel())
        if size > 1:
            self._pending = transport.exchange(sends, receives)

    def wait(self) -> None:
        self._pending.wait()
        for entry in self._parts.layouts[self._layer].entries:
            if entry.cut.dim != 0:
                parts = [part.clone() for part in _rooms(entry, self._target, self._parts.transport.size)]
                torch.cat(parts, entry.cut.dim, out=entry.whole(self._target))


class _Queued:
    """What is on a stream now."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = stream.record_event()

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)


class _All:
    def __init__(self, pendings: Sequence[Pending]) -> None:
        self._pendings = pendings

    def wait(self) -> None:
        for pending in self._pendings:
            pending.wait()


def _rooms(entry: Entry, target: Tensor, size: int) -> list[Tensor]:
    """Where each rank's part arrives: one behind the other in the parameter's memory, each contiguous."""
    flat = entry.whole(target).view(-1)
    shapes = [entry.cut.shape(entry.shape, rank) for rank in range(size)]
    rooms = torch.split(flat, [torch.Size(shape).numel() for shape in shapes])
    return [room.view(shape) for room, shape in zip(rooms, shapes, strict=True)]
