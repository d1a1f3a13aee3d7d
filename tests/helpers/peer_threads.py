"""Peer memory among threads: every rank's memory is a CPU tensor that all can read, every pull queue a thread.

Computations run at once, on the rank's own thread; pulls run whenever their thread gets to them, after a delay that the
test chooses. New memory holds NaN. So a copy that starts too early takes NaN or the round before, and memory that is
written too early gives a late reader the round after.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue

import torch
from torch import Tensor

from ds_ring.errors import TransportError
from ds_ring.parallel.topology import Axis, Topology
from ds_ring.testing.threaded import ThreadedTransport, ThreadedWorld
from ds_ring.transport.base import Transport
from ds_ring.transport.copy_engine import CopyEngineTransport
from ds_ring.transport.mesh import Mesh
from ds_ring.transport.peer_memory import rows_of
from ds_ring.transport.select import PULLED_AXES
from tests.helpers.cores import share_a_core
from tests.helpers.limits import HANG_S

FLAG_S = HANG_S
"""How long a flag is waited for."""
Delay = Callable[[int, int], float]
"""(rank, peer) -> seconds by which a copy from the peer is late."""


class _Shared:
    """What all ranks hold of one allocation: ``data`` in rank order."""

    def __init__(self, data: list[Tensor], flags: int) -> None:
        self.data = data
        self.flags = [[0] * flags for _ in data]
        self.risen = threading.Condition()


@dataclass
class ThreadMemory:
    shared: _Shared
    rank: int

    @property
    def nbytes(self) -> int:
        return self.shared.data[self.rank].numel()

    def data(self, rank: int) -> Tensor:
        return self.shared.data[rank]


class AtOnce:
    """The queue of computations: what is appended has happened."""

    def __init__(self, device: ThreadDevice) -> None:
        self._device = device

    def after(self, other: object) -> None:
        raise AssertionError("computations wait through a mark")

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def raise_flag(self, memory: ThreadMemory, rank: int, flag: int, value: int) -> None:
        with memory.shared.risen:
            assert value > memory.shared.flags[rank][flag], "flags only rise"
            memory.shared.flags[rank][flag] = value
            memory.shared.risen.notify_all()

    def wait_flag(self, memory: ThreadMemory, flag: int, value: int) -> None:
        flags = memory.shared.flags[memory.rank]
        begun = time.monotonic()
        with memory.shared.risen:
            while not memory.shared.risen.wait_for(lambda: flags[flag] >= value, 0.1):
                if time.monotonic() - begun > FLAG_S or self._device.abandoned:
                    raise TransportError(f"rank {memory.rank}: flag {flag} stays at {flags[flag]}, short of {value}")


@dataclass
class _Mark:
    passed: threading.Event = field(default_factory=threading.Event)
    errors: list[BaseException] = field(default_factory=list)

    def wait(self) -> None:
        assert self.passed.wait(HANG_S), "a queue does not move"
        if self.errors:
            raise self.errors[0]


class Later(AtOnce):
    """A pull queue: a thread that takes its time."""

    def __init__(self, device: ThreadDevice, peer: int) -> None:
        super().__init__(device)
        self._peer = peer
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._errors: list[BaseException] = []
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            work = self._work.get()
            try:
                with torch.inference_mode():
                    work()
            except BaseException as error:
                self._errors.append(error)

    def after(self, other: object) -> None:
        assert type(other) is AtOnce, "what computations have appended has happened"

    def copy(self, target: Tensor, source: Tensor) -> None:
        to, of = rows_of(target), rows_of(source)
        assert to is not None
        assert of is not None
        assert to[0] == 1 or of[0] == 1 or to[:2] == of[:2]

        def work() -> None:
            time.sleep(self._device.delay(self._device.rank, self._peer))
            target.copy_(source)

        self._work.put(work)

    def raise_flag(self, *what: object) -> None:
        self._work.put(lambda: AtOnce.raise_flag(self, *what))

    def wait_flag(self, *what: object) -> None:
        self._work.put(lambda: AtOnce.wait_flag(self, *what))

    def mark(self) -> _Mark:
        mark = _Mark(errors=self._errors)
        self._work.put(mark.passed.set)
        return mark


class ThreadDevice:
    """``one_queue``: all pulls wait in one line, as where a GPU runs unrelated streams in one hardware queue."""

    def __init__(self, control: Transport, delay: Delay, one_queue: bool = False) -> None:
        self._control, self.rank, self.delay = control, control.rank, delay
        self._compute = AtOnce(self)
        self._pulls = [Later(self, peer) for peer in range(control.size)]
        if one_queue:
            self._pulls = self._pulls[:1] * control.size
        self.allocated: list[int] = []
        self.held = self.peak = 0

    @property
    def abandoned(self) -> bool:
        return isinstance(self._control, ThreadedTransport) and self._control.abandoned

    def allocate(self, nbytes: int, flags: int) -> ThreadMemory:
        self.meet()
        with self._control.together():
            own = self.own_bytes(nbytes)
        data = self._control.hand_round(own)
        assert all(other.numel() == nbytes for other in data), "ranks allocate alike"
        shared = self._control.hand_round(_Shared(data, flags))[0]
        self.allocated.append(nbytes)
        self.held += nbytes
        self.peak = max(self.peak, self.held)
        return ThreadMemory(shared, self.rank)

    def free(self, memory: ThreadMemory) -> None:
        """Who reads it after all finds NaN, as in new memory."""
        self.meet()
        self.held -= memory.nbytes
        memory.data(self.rank).fill_(0xFF)

    def meet(self) -> None:
        for queue in self._pulls:
            queue.mark().wait()
        self._control.barrier()

    def own_bytes(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), 0xFF, dtype=torch.uint8)

    def computations(self) -> AtOnce:
        return self._compute

    def pulls(self, peer: int) -> Later:
        return self._pulls[peer]


def no_delay(rank: int, peer: int) -> float:
    return 0.0


LATE_S = 0.02


def one_is_late(rank: int, peer: int) -> float:
    return LATE_S if rank == 1 else 0.0


def all_are_late(rank: int, peer: int) -> float:
    return LATE_S


def random_delay(seed: int):
    dice = random.Random(seed)
    return lambda rank, peer: dice.choice((0.0, 0.0, 0.002, 0.006))


def copy_engine_mesh(delay: Delay = no_delay) -> Callable[[ThreadedWorld, Topology, int], Mesh]:
    """Meshes whose axes pull where they can."""

    def make(world: ThreadedWorld, topology: Topology, rank: int) -> Mesh:
        def connect(axis: Axis, ranks: tuple[int, ...]) -> Transport | None:
            if rank not in ranks:
                return None
            control = world.transport(axis, ranks, rank)
            if axis not in PULLED_AXES:
                return control
            return CopyEngineTransport(control, ThreadDevice(control, delay))

        return Mesh.build(topology, rank, connect)

    return make


def pulling(
    size: int, work: Callable[[CopyEngineTransport], object], delay: Delay = no_delay, one_queue: bool = False
) -> list[object]:
    """``work(transport)`` on every rank of one group; results in rank order."""
    world = ThreadedWorld(size, HANG_S)

    def on_rank(rank: int) -> object:
        share_a_core()
        control = world.transport("world", range(size), rank)
        return work(CopyEngineTransport(control, ThreadDevice(control, delay, one_queue)))

    return world.run(on_rank)
