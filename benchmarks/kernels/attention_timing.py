"""Sustained rates of a call, with its own clock and power, in turn with those of a matrix product.

A GPU at its power limit slows down within a second, so whatever ran first, on a cool GPU, would look faster. Therefore
the call and the product run in turn, each alone for a block of time, and each is measured in its own blocks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from benchmarks.layouts.gpu_telemetry import watched_gpu

Call = Callable[[], object]

BLOCK_SECONDS = 0.5
CHUNK_SECONDS = 0.05
"""Time between two marks: so long that neither marks nor the host's part of short calls matter."""

SAMPLE_SECONDS = 0.02


class Stopwatch(Protocol):
    """Takes times by marks in a device's queue of work."""

    def mark(self) -> Any: ...
    def seconds(self, start: Any, stop: Any) -> float:
        """Time between two marks. Waits until the device has reached the second."""
        ...


class GpuStopwatch:
    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3


class HostStopwatch:
    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, stop: float) -> float:
        return stop - start


def stopwatch(device: torch.device) -> Stopwatch:
    return GpuStopwatch() if device.type == "cuda" else HostStopwatch()


@dataclass
class Timed:
    """A call and its measurements."""

    call: Call
    calls_per_chunk: int
    chunks: list[float] = field(default_factory=list)
    """Seconds of a call, for each chunk."""
    gpu: list[dict[str, float]] = field(default_factory=list)

    @property
    def sustained(self) -> float:
        return sum(self.chunks) * self.calls_per_chunk

    @property
    def seconds(self) -> float:
        return statistics.median(self.chunks)

    def sensor(self, name: str) -> float | None:
        values = [found[name] for found in self.gpu if name in found]
        return statistics.median(values) if values else None


def time_in_turn(
    call: Call, product: Call, seconds: float, device: torch.device, watch: Stopwatch | None = None
) -> tuple[Timed, Timed]:
    """(the call, the product), measured in turn until each has run for ``seconds``."""
    watch = watch or stopwatch(device)
    timed, beside = (Timed(f, _calls_per_chunk(f, min(CHUNK_SECONDS, seconds), watch)) for f in (call, product))
    while min(timed.sustained, beside.sustained) < seconds:
        for one in (beside, timed):
            with watched_gpu(device, SAMPLE_SECONDS) as gpu:
                one.chunks += sustain(one.call, one.calls_per_chunk, min(BLOCK_SECONDS, seconds), watch)
            one.gpu.append(gpu)
    return timed, beside


def sustain(call: Call, calls: int, seconds: float, watch: Stopwatch) -> list[float]:
    """Call without pause for ``seconds``. Returns the seconds of a call, for each chunk of ``calls`` calls.

    The host waits for a chunk only after the next one is queued, so the device is never without work.
    """
    chunks: list[float] = []
    marks = [watch.mark()]
    while sum(chunks) * calls < seconds:
        for _ in range(calls):
            call()
        marks.append(watch.mark())
        if len(marks) > 2:
            chunks.append(watch.seconds(marks[-3], marks[-2]) / calls)
    chunks.append(watch.seconds(marks[-2], marks[-1]) / calls)
    return chunks


def quick_seconds(call: Call, watch: Stopwatch, seconds: float = 0.1) -> float:
    """A rough time of a call, to choose by: the median of a few chunks."""
    return statistics.median(sustain(call, _calls_per_chunk(call, seconds / 4, watch), seconds, watch))


def _calls_per_chunk(call: Call, chunk_seconds: float, watch: Stopwatch) -> int:
    calls = 1
    for _ in range(2):  # the time of a single call includes its launch; that of several hardly does
        start = watch.mark()
        for _ in range(calls):
            call()
        once = watch.seconds(start, watch.mark()) / calls
        calls = max(1, min(1000, round(chunk_seconds / max(once, 1e-9))))
    return calls
