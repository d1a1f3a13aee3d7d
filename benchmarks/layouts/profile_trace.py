"""One step under PyTorch's profiler: a Chrome trace of every rank, and the share of each kind of work.

Times are read from the trace. On a GPU they are those of kernels and copies, and the *compute stream* is the busiest
stream. On a CPU they are operators' own times, without those of operators inside them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch.profiler import ProfilerActivity, profile

from ds_ring.utils.device import synchronize

Category = Literal["gemm", "attention", "elementwise", "copy", "communication"]
Interval = tuple[float, float]

_GPU_CATEGORIES = {"kernel", "gpu_memcpy", "gpu_memset"}
# The first category with a word in the name. All others are elementwise: norms, activations, rotary embeddings, …
_WORDS: tuple[tuple[Category, tuple[str, ...]], ...] = (
    ("communication", ("nccl", "gloo", "c10d")),
    ("attention", ("attention", "attend", "flash", "fmha", "sdpa")),
    ("gemm", ("gemm", "nvjet", "xmma", "cutlass", "addmm", "::mm", "bmm", "matmul", "linear", "einsum")),
    ("copy", ("memcpy", "memset", "copy", "::cat", "::clone", "::contiguous", "::to", "::fill_", "::zero_")),
)


@dataclass(frozen=True)
class Span:
    """Work on ``lane`` (a stream, or the CPU) from ``start`` to ``stop``, in microseconds."""

    start: float
    stop: float
    category: Category
    lane: str


def trace_step(step: Callable[[], None], device: torch.device, file: Path, rank: int, layers: int) -> dict[str, float]:
    """Run ``step`` once. Writes its Chrome trace to ``file``, other ranks' beside it, and returns its ``summary``."""
    file = file if rank == 0 else file.with_name(f"{file.stem}.rank{rank}{file.suffix}")
    file.parent.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        step()
        synchronize(device)
    profiler.export_chrome_trace(str(file))
    return summary(spans(json.loads(file.read_text())["traceEvents"]), layers)


def summary(found: list[Span], layers: int) -> dict[str, float]:
    """Milliseconds of one step.

    ``gemm_ms``, ``attention_ms``, ``elementwise_ms``, ``copy_ms``, ``communication_ms``: work on the compute stream.
    ``idle_ms``: time without work there. ``window_ms``: from the first to the last event of any stream; the sum of the
    above. ``transfer_ms``: time of transfers between ranks (communication kernels on any stream, copies on other
    streams). ``transfer_exposed_ms``: the part in which the compute stream did not compute.
    ``transfer_exposed_ms_per_layer``: that ÷ ``layers``.
    """
    if not found:
        return {}
    time_by_lane: dict[str, float] = defaultdict(float)
    for span in found:
        if span.category != "communication":
            time_by_lane[span.lane] += span.stop - span.start
    main = max(time_by_lane, key=lambda lane: time_by_lane[lane], default=found[0].lane)
    on_main = [span for span in found if span.lane == main]
    window = (min(s.start for s in found), max(s.stop for s in found))
    computing = union((s.start, s.stop) for s in on_main if s.category != "communication")
    moving = union(
        (s.start, s.stop) for s in found if s.category == "communication" or (s.category == "copy" and s.lane != main)
    )
    exposed = length(union([*moving, *computing])) - length(computing)
    figures = {
        f"{category}_ms": sum(s.stop - s.start for s in on_main if s.category == category)
        for category in get_args(Category)
    }
    figures |= {
        "idle_ms": window[1] - window[0] - length(union((s.start, s.stop) for s in on_main)),
        "window_ms": window[1] - window[0],
        "transfer_ms": length(moving),
        "transfer_exposed_ms": exposed,
        "transfer_exposed_ms_per_layer": exposed / layers,
    }
    return {name: value / 1e3 for name, value in figures.items()}


def spans(events: Iterable[dict[str, Any]]) -> list[Span]:
    """The work in the events of a Chrome trace."""
    complete = [e for e in events if e.get("ph") == "X"]
    on_gpu = [e for e in complete if e.get("cat") in _GPU_CATEGORIES]
    if on_gpu:
        return [
            Span(e["ts"], e["ts"] + e["dur"], categorise(e["name"]), f"stream {e['args']['stream']}") for e in on_gpu
        ]
    by_thread: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in complete:
        if event.get("cat") == "cpu_op":
            by_thread[event["tid"]].append(event)
    return [span for thread in by_thread.values() for span in _own_times(thread)]


def categorise(name: str) -> Category:
    low = name.lower()
    return next((category for category, words in _WORDS if any(word in low for word in words)), "elementwise")


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of intervals, as disjoint intervals in ascending order."""
    merged: list[Interval] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], stop)
        else:
            merged.append((start, stop))
    return merged


def length(disjoint: Iterable[Interval]) -> float:
    return sum(stop - start for start, stop in disjoint)


def _own_times(events: list[dict[str, Any]]) -> list[Span]:
    """The innermost operator at every moment of one thread.

    All computing threads of a rank are one lane, "cpu", because only one of them runs at a time."""
    found: list[Span] = []
    open_events: list[tuple[float, Category]] = []
    now = 0.0

    def run_until(moment: float) -> None:
        nonlocal now
        if open_events and moment > now:
            category = open_events[-1][1]
            found.append(Span(now, moment, category, "network" if category == "communication" else "cpu"))
        now = max(now, moment)

    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        while open_events and open_events[-1][0] <= event["ts"]:
            run_until(open_events[-1][0])
            open_events.pop()
        run_until(event["ts"])
        open_events.append((event["ts"] + event["dur"], categorise(event["name"])))
    while open_events:
        run_until(open_events[-1][0])
        open_events.pop()
    return found
