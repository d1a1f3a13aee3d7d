"""Passes over a batch on all ranks together: their times, and the bytes that they send."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.communication.engines import recorded
from benchmarks.communication.journal import Journal
from ds_ring.engine.engine import Engine
from ds_ring.utils.device import synchronize


@dataclass(frozen=True)
class Timing:
    """Seconds of each timed pass, on its slowest rank."""

    samples_s: list[float]

    @property
    def median_s(self) -> float:
        return statistics.median(self.samples_s)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median."""
        return (max(self.samples_s) - min(self.samples_s)) / self.median_s


def time_passes(engine: Engine, step: Callable[[], None], repeats: int, sustain_s: float = 0) -> Timing:
    """Time ``step`` on all ranks together: at least ``repeats`` times, and for at least ``sustain_s`` seconds.
    Collective. The time of a pass is that of its slowest rank."""
    own: list[float] = []
    begun = time.perf_counter()
    # Rank 0's clock decides, so that all ranks end after the same pass.
    while len(own) < repeats or engine.gather(time.perf_counter() - begun)[0] < sustain_s:
        with engine.watchdog.watch("a timed pass"):
            synchronize(engine.device)
            engine.meet()
            started = time.perf_counter()
            step()
            synchronize(engine.device)
            own.append(time.perf_counter() - started)
    everyone = engine.gather(own)
    return Timing([max(samples) for samples in zip(*everyone, strict=True)])


def count_bytes(engine: Engine, step: Callable[[], None]) -> tuple[float, Journal]:
    """(mean bytes that a rank sends in one pass, journal of what this rank does to send and receive). Collective."""
    traffic = engine.mesh.traffic
    traffic.bytes_by_op.clear()
    with recorded(engine) as journal:
        step()
    everyone = engine.gather(traffic.bytes_sent)
    return statistics.mean(everyone), journal
