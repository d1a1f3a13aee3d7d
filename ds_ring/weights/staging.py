"""Two buffers in which layers are whole while they run: layer i in buffer i mod 2, the next one on its way meanwhile.

A buffer is filled again when the last micro-batch in flight has left its layer. Layers are fetched in the order of
their use, the first ones again behind the last where more micro-batches follow. What is expected may be wrong: a layer
that is not there when it runs is fetched then. All ranks run the same micro-batches in the same order, and so fetch
alike.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from greenlet import getcurrent
from torch import Tensor, nn

from ds_ring.hf.tensor_slices import is_sliced
from ds_ring.transport.shared import Pending
from ds_ring.weights.fetch import Parts

BUFFERS = 2


class _Buffer:
    """Attributes:
    layer: what it holds, or will when ``pending`` has ended; None: nothing.
    began: when, counted in fetches of this rank.
    users: ids of the lanes that are inside that layer. Not the greenlets: one that is held may outlive its thread.
    is_free: no lane that was expected is inside, or will be.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.layer: int | None = None
        self.pending: Pending | None = None
        self.began = 0
        self.users: set[int] = set()
        self.is_free = True


class Staging:
    """The buffers of one model on this rank."""

    def __init__(self, parts: Parts, device: torch.device) -> None:
        self.parts = parts
        self.yield_lane: Callable[[], None] | None = None
        """Lets other micro-batches in flight go on; None where there are none."""
        # No more than there are layers.
        largest = [
            max(layout.nbytes for layout in parts.layouts[number::BUFFERS])
            for number in range(min(BUFFERS, len(parts.layouts)))
        ]
        self._buffers = [_Buffer(torch.empty(nbytes, dtype=torch.uint8, device=device)) for nbytes in largest]
        self._left: Counter[int] = Counter()
        self._passes = self._lanes = self._fetched = self._begun = 0

    @property
    def nbytes(self) -> int:
        return sum(buffer.memory.nbytes for buffer in self._buffers)

    def memory_of(self, layer: int) -> Tensor:
        """Where the layer is when it is whole."""
        return self._buffers[layer % BUFFERS].memory[: self.parts.layouts[layer].nbytes]

    def hook(self, layers: nn.ModuleList) -> None:
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(_Entering(self, number))
            layer.register_forward_hook(_Leaving(self, number), always_call=True)

    @contextmanager
    def passes(self, count: int, lanes: int = 1) -> Iterator[None]:
        """Inside the block ``count`` micro-batches run through all layers, ``lanes`` at a time."""
        self._left.clear()
        self._passes, self._lanes, self._fetched = count, lanes, 0
        # What a pass that ended in an error left on its way: messages are taken in the order in which they were sent.
        for buffer in sorted(self._buffers, key=lambda one: one.began):
            self._arrive(buffer)
        for buffer in self._buffers:
            buffer.is_free = True
        self._fetch_ahead()
        try:
            yield
        finally:
            self._passes = 0
            for buffer in self._buffers:
                buffer.users.clear()

    def enter(self, number: int) -> None:
        """The lane is about to run layer ``number``, which is whole from here on."""
        buffer = self._buffers[number % BUFFERS]
        while buffer.users and buffer.layer != number:
            assert self.yield_lane is not None, "a layer runs inside another"
            self.yield_lane()
        self._fetch(buffer, number)
        self._arrive(buffer)
        buffer.users.add(id(getcurrent()))

    def leave(self, number: int) -> None:
        """The lane has run it."""
        buffer = self._buffers[number % BUFFERS]
        buffer.users.discard(id(getcurrent()))
        self._left[number] += 1
        if not buffer.users and (self._left[number] % self._lanes == 0 or self._left[number] == self._passes):
            buffer.is_free = True
            self._fetch_ahead()

    def _fetch_ahead(self) -> None:
        """What comes next in the order of use, as far as buffers are free."""
        count = len(self.parts.layouts)
        while self._fetched < count * math.ceil(self._passes / max(self._lanes, 1)):
            number = self._fetched % count
            buffer = self._buffers[number % BUFFERS]
            if not buffer.is_free:
                return
            buffer.is_free = False
            self._fetch(buffer, number)
            self._fetched += 1

    def _fetch(self, buffer: _Buffer, number: int) -> None:
        """Have the layer come, if it is not there, nor on its way."""
        if buffer.layer == number:
            return
        self._arrive(buffer)  # of another layer, for nothing; but its messages must be taken
        buffer.layer = None
        buffer.pending = self.parts.start(number, buffer.memory)
        buffer.layer = number
        self._begun += 1
        buffer.began = self._begun

    def _arrive(self, buffer: _Buffer) -> None:
        """Wait for what is on its way. Where that fails, the buffer holds nothing."""
        pending, layer = buffer.pending, buffer.layer
        if pending is not None:
            buffer.pending = buffer.layer = None
            pending.wait()
            buffer.layer = layer


class _Entering:
    def __init__(self, staging: Staging, number: int) -> None:
        self._staging, self._number = staging, number

    def __call__(self, layer: nn.Module, inputs: object) -> None:
        if not is_sliced(layer):
            self._staging.enter(self._number)


class _Leaving:
    def __init__(self, staging: Staging, number: int) -> None:
        self._staging, self._number = staging, number

    def __call__(self, layer: nn.Module, inputs: object, out: object) -> None:
        if not is_sliced(layer):
            self._staging.leave(self._number)
