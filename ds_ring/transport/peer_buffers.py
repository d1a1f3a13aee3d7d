"""The copy engine's protocol: memory in buffers, used round after round, and the flags that say when.

Shared tensors lie in *buffers*, each one ``PeerMemory`` on every rank; all ranks use buffers in the same order. Using a
buffer once is a *round*, numbered 1, 2, .. in each buffer. A buffer has two flags for every peer p:

- WRITTEN + p, in my memory: p's buffer holds what p wrote in that round. Raised by p.
- READ + p, in my memory: p has taken what it wanted from my buffer in that round. Raised by p.

Round n of a buffer, on every rank (C: the queue of computations, P: the queue for one peer):

1. acquire: C waits for READ + p >= m, for every peer p that was to read in the last published round m < n.
   Only then may the buffer be written.
2. write, on C.
3. publish: C raises WRITTEN + me to n at every reader.
4. pull from p: P goes behind C (the target's memory is free), waits for WRITTEN + p >= n, copies, and raises READ + me
   to n at p. What uses the copy, on C, goes behind P.
5. release: the buffer may be acquired again. This rank's own reading of it is on C, as is the writing of a later round.

Why that is enough. A buffer is overwritten only behind (1), when all readers' copies are done. A copy starts only
behind (3) and so behind the writing, and sees round n, not a later one: p cannot write a later round before we raise
READ. Flags only rise, so that no signal is lost or taken for another, however far one rank runs ahead; it can run at
most as far as the buffers go. Readers and pulls are both derived from the layout and must agree: a pull that was not
published waits for ever, a reader that does not pull stops the writer. All waits are for things that the waited-for
rank queued earlier in the common order of operations, so that there is no cycle, even where a GPU runs unrelated
streams in one hardware queue.

At least two buffers are used in turn, so that the next layer's tensor is written while peers still read this one's. A
tensor of ``LARGE`` bytes and more makes do with any buffer that is free: what a second one would hide is nothing beside
a layer of so many tokens, and it may not fit. How many there are is no part of the argument above.

A buffer that is too small is replaced by all ranks together (shapes are equal on all), with all others that are free
and too small; old and new memory are never held at once. Ranks meet when all that they had queued is done, so that
nobody reads the old any more; each gives it back, its own and its sight of its peers'; and they meet once more before
they allocate, since memory that a peer still sees is not free yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ds_ring.transport.peer_memory import Device, PeerMemory, rows_of
from ds_ring.transport.shared import Pending

MIN_BUFFERS = 2
LARGE = 4 << 30
FARTHEST = 1 << 30
"""Bytes from one row of a copy to the next; CUDA's limit is one less than twice that."""


class PeerBuffer:
    """Memory that is used round after round; ``readers`` are those of the last published one."""

    def __init__(self, memory: PeerMemory) -> None:
        self.memory = memory
        self.round = 0
        self.published = 0
        self.readers: list[int] = []

    def view(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """``rank``'s tensor in this buffer."""
        return self.memory.data(rank)[: nbytes(shape, dtype)].view(dtype).view(shape)


class BufferPool:
    """The buffers of one group on this rank."""

    def __init__(self, device: Device, rank: int, size: int) -> None:
        self._device, self._rank, self._size = device, rank, size
        self._free: list[PeerBuffer] = []
        self.count = self.nbytes = 0

    def acquire(self, needed: int) -> PeerBuffer:
        """A buffer of at least so many bytes that may be written."""
        if self._free and needed >= LARGE:
            # The largest: whichever is grown stays as large.
            buffer = max(self._free, key=lambda buffer: buffer.memory.nbytes)
            self._free.remove(buffer)
        elif self._free and self.count >= MIN_BUFFERS:
            buffer = self._free.pop(0)
        else:
            buffer = self._new(needed)
        if buffer.memory.nbytes < needed:
            # With all that is free and too small: each would grow in its turn, wanted or not. Fewer and larger tensors
            # may be open at once than before.
            self._drop_free_below(needed)
            self._drop(buffer)
            buffer = self._new(needed)
        buffer.round += 1
        queue = self._device.computations()
        for reader in buffer.readers:
            queue.wait_flag(buffer.memory, self._size + reader, buffer.published)
        buffer.readers = []
        return buffer

    def reserve(self, needed: int) -> None:
        """So that ``acquire`` allocates nothing for so many bytes while a round is open: ranks that allocate wait for
        all they have queued, which may be a pull that a peer publishes for only behind that. No round may be open."""
        count = max(self.count, MIN_BUFFERS)
        self._drop_free_below(needed)
        while self.count < count:
            self._free.append(self._new(needed))

    def publish(self, buffer: PeerBuffer, readers: Sequence[int]) -> None:
        queue = self._device.computations()
        buffer.readers, buffer.published = list(readers), buffer.round
        for reader in readers:
            queue.raise_flag(buffer.memory, reader, self._rank, buffer.round)

    def pull(self, buffer: PeerBuffer, peer: int, pieces: Iterator[tuple[Tensor, Tensor]]) -> Pending:
        """Copy ``pieces`` (target, part of the peer's tensor) once the peer has published this round."""
        queue = self._device.pulls(peer)
        queue.after(self._device.computations())
        queue.wait_flag(buffer.memory, peer, buffer.round)
        for target, source in pieces:
            queue.copy(target, source)
        queue.raise_flag(buffer.memory, peer, self._size + self._rank, buffer.round)
        return queue.mark()

    def release(self, buffer: PeerBuffer) -> None:
        self._free.append(buffer)

    def _new(self, needed: int) -> PeerBuffer:
        buffer = PeerBuffer(self._device.allocate(needed, 2 * self._size))
        self.count += 1
        self.nbytes += buffer.memory.nbytes
        return buffer

    def _drop_free_below(self, needed: int) -> None:
        small = [buffer for buffer in self._free if buffer.memory.nbytes < needed]
        self._free = [buffer for buffer in self._free if buffer.memory.nbytes >= needed]
        for buffer in small:
            self._drop(buffer)

    def _drop(self, buffer: PeerBuffer) -> None:
        self.count -= 1
        self.nbytes -= buffer.memory.nbytes
        self._device.free(buffer.memory)


def pieces(target: Tensor, source: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The fewest pairs of parts of equal tensors that an engine copies: rows at one distance, or whole memory, on
    either side."""
    widths = [_width(target), _width(source)]
    if 0 not in widths and len({*widths, target.numel()}) <= 2:
        yield target, source
    else:
        for t, s in zip(target, source, strict=True):
            yield from pieces(t, s)


def _width(tensor: Tensor) -> int:
    """Elements of each row of a tensor that is rows at one distance, not too far apart; of no other: 0."""
    rows = rows_of(tensor)
    return rows[1] if rows and (rows[0] == 1 or rows[2] * tensor.element_size() <= FARTHEST) else 0


def nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
