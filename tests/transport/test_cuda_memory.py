"""Symmetric memory in steps that fail on all ranks or on none; over stand-ins for PyTorch's, so that no GPU is needed.

(The real one: tests/gpu/test_copy_engine.py)
"""

import weakref

import pytest
import torch

from ds_ring.errors import TransportError
from ds_ring.testing.threaded import ThreadedWorld
from ds_ring.transport.cuda_memory import CudaDevice
from ds_ring.transport.peer_buffers import BufferPool
from tests.helpers.limits import HANG_S
from tests.helpers.mocked_world import outcome

SIZE = 3


class _Memory:
    """PyTorch's symmetric memory, of ranks that are threads; a device's index is its rank.

    A rank's memory is there until no rank holds it: ``peaks`` tells for every rank of how much that was so at once.
    """

    def __init__(self) -> None:
        self.world = ThreadedWorld(SIZE, HANG_S)
        self.failing = ""
        self.peaks = [0] * SIZE
        self._held: list[weakref.WeakSet[torch.Tensor]] = [weakref.WeakSet() for _ in range(SIZE)]

    def _fail(self, step: str, rank: int) -> None:
        if rank == 1 and step == self.failing:
            raise RuntimeError(f"no {step}")

    def synchronize(self, device: torch.device) -> None:
        self._fail("synchronize", device.index)

    def empty_strided_p2p(self, size, stride, dtype, device):
        rank = device.index
        self._fail("memory", rank)
        own = torch.full(size, rank + 1, dtype=dtype)
        self._held[rank].add(own)
        self.peaks[rank] = max(self.peaks[rank], sum(tensor.nbytes for tensor in self._held[rank]))
        return own

    def rendezvous(self, own, rank):
        group = self.world.transport("rendezvous", range(SIZE), rank)
        handle = _Handle(rank, group.hand_round(own))
        group.hand_round(None)  # the group holds what was gathered last
        self._fail("rendezvous", rank)
        return handle


class _Handle:
    def __init__(self, rank, buffers) -> None:
        self.rank, self._buffers = rank, buffers

    def get_buffer(self, peer, sizes, dtype):
        return self._buffers[peer]


@pytest.fixture
def memory(monkeypatch):
    memory = _Memory()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", memory.synchronize)
    monkeypatch.setattr("torch._C._distributed_c10d._SymmetricMemory", memory)
    monkeypatch.setattr("torch.distributed._symmetric_memory.rendezvous", memory.rendezvous)
    return memory


def on_ranks(memory, work):
    """``work(device)`` on every rank; all must be able to agree on something behind it."""

    def on_rank(rank):
        control = memory.world.transport("world", range(SIZE), rank)
        control.group = rank
        found = work(CudaDevice(control, torch.device("cpu", rank)))
        assert control.all_gather_objects("behind it") == ["behind it"] * SIZE
        return found

    return memory.world.run(on_rank)


def test_memory_of_every_rank_begins_with_flags_that_are_zero(memory):
    for found in on_ranks(memory, lambda device: device.allocate(5000, 2 * SIZE)):
        assert found.nbytes == 8192
        assert [found.data(rank).unique().tolist() for rank in range(SIZE)] == [[1], [2], [3]]
        assert not any(buffer[:4096].any() for buffer in found._buffers)


@pytest.mark.parametrize("step", ["synchronize", "memory", "rendezvous"])
def test_a_step_that_fails_on_one_rank_fails_on_all(memory, step):
    memory.failing = step
    errors = on_ranks(memory, lambda device: outcome(lambda: device.allocate(10, 2 * SIZE)))
    assert [(type(error), str(error)) for error in errors] == [
        (TransportError, f"rank 1: no {step}"), (RuntimeError, f"no {step}"), (TransportError, f"rank 1: no {step}")
    ]  # fmt: skip


def grow(buffers, needed):
    buffers.release(buffers.acquire(needed))


@pytest.mark.parametrize("grows", [grow, BufferPool.reserve])
def test_slots_that_grow_are_given_back_on_all_ranks_before_anyone_allocates(memory, grows):
    page, small, large = 4096, 4096, 5 * 4096

    def work(device):
        buffers = BufferPool(device, device._control.rank, SIZE)
        for needed in (small, small, large, large):
            grows(buffers, needed)
        return buffers.nbytes

    assert on_ranks(memory, work) == [2 * large] * SIZE
    assert memory.peaks == [2 * (page + large)] * SIZE
