"""Without a GPU, Triton's kernels are interpreted. Triton reads the switch when it is first imported: set it before."""

import os
import time

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def late_writer(monkeypatch):
    """Rank 0 takes its time between having a slot and writing into it."""
    from ds_ring.transport.peer_buffers import BufferPool
    from tests.helpers.peer_threads import LATE_S

    acquire = BufferPool.acquire

    def late(self, needed):
        buffer = acquire(self, needed)
        time.sleep(2 * LATE_S if self._rank == 0 else 0.0)
        return buffer

    monkeypatch.setattr(BufferPool, "acquire", late)
