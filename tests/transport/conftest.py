"""What tests of transports share."""

import time

import pytest

from ds_ring.transport.peer_buffers import BufferPool
from tests.helpers.peer_threads import LATE_S


@pytest.fixture
def late_writer(monkeypatch):
    """Rank 0 is late to write into a buffer that it has."""
    acquire = BufferPool.acquire

    def late(self, needed):
        buffer = acquire(self, needed)
        time.sleep(2 * LATE_S if self._rank == 0 else 0.0)
        return buffer

    monkeypatch.setattr(BufferPool, "acquire", late)
