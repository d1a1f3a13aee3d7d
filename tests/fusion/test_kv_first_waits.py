"""The waits of the copy engine's protocol, in whole models: each of them is needed."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

from ds_ring.attention.kv_exchange import KVExchange
from ds_ring.errors import NumericsError
from ds_ring.transport.peer_buffers import BufferPool, PeerBuffer
from tests.helpers.attention_models import FUSED, LENGTH
from tests.helpers.mocked_world import relative_error, serve
from tests.helpers.peer_threads import LATE_S, AtOnce, Later, all_are_late, copy_engine_mesh
from tests.helpers.tiny_models import build, logits, tokens

WRONG = 1e-2


class TestMistakesShow:
    """Without one of the protocol's waits, a whole model's logits are wrong. What the wait would have prevented is made
    to happen, so the test does not depend on timing."""

    PATIENCE_S = 5.0

    @staticmethod
    def error(monkeypatch, delay: Callable[[int, int], float], **options: Any) -> float:
        monkeypatch.setattr("tests.helpers.mocked_world.copy_engine_mesh", lambda: copy_engine_mesh(delay))
        model, ids = build(FUSED(num_hidden_layers=4)), tokens(2, LENGTH)
        options |= {"ring_degree": 3, "wire": "copy_engine", "batch_size": 2, "micro_batch_size": 2}
        try:
            # The memory that other ranks read exists from the first forward on.
            got = serve(model, lambda engine: [engine(ids).logits for _ in range(2)][-1], **options)
        except NumericsError:
            return math.inf  # memory that no rank has written yet holds NaN
        return max(relative_error(found, logits(model, ids)) for found in got)

    def test_reading_before_the_owner_has_written(self, monkeypatch):
        """Rank 0 writes after others have begun to read."""
        assert self.error(monkeypatch, all_are_late) < 1e-5
        begun, acquire = threading.Event(), BufferPool.acquire

        def late(pool: BufferPool, needed: int) -> PeerBuffer:
            buffer = acquire(pool, needed)
            if pool._rank == 0:
                begun.wait(self.PATIENCE_S)
                time.sleep(LATE_S)
            return buffer

        def delay(rank: int, peer: int) -> float:
            if peer == 0:
                begun.set()
            return 0.0

        monkeypatch.setattr(BufferPool, "acquire", late)
        monkeypatch.setattr(Later, "wait_flag", lambda *_: None)
        assert not self.error(monkeypatch, delay) < WRONG

    def test_writing_before_all_readers_have_finished(self, monkeypatch):
        """Rank 0 of a contiguous ring is read and never reads: only flags make it wait. Readers wait for it."""
        assert self.error(monkeypatch, all_are_late, ring_impl="contiguous") < 1e-5
        started: list[int] = []
        finished, start, wait = threading.Event(), KVExchange.start, AtOnce.wait_flag

        def counted(exchange: KVExchange) -> None:
            start(exchange)
            started.extend([0] if exchange.transport.rank == 0 else [])
            if len(started) == 8:
                finished.set()

        monkeypatch.setattr(KVExchange, "start", counted)
        monkeypatch.setattr(
            AtOnce, "wait_flag", lambda self, *what: None if type(self) is AtOnce else wait(self, *what)
        )

        def delay(rank: int, peer: int) -> float:
            # In the second forward, until rank 0 has run all of its layers.
            if peer != rank and len(started) > 4:
                finished.wait(self.PATIENCE_S)
            return 0.0

        assert not self.error(monkeypatch, delay, ring_impl="contiguous") < WRONG
