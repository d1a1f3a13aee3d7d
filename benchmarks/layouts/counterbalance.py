"""Timing every layout twice (``--there-and-back``): in order, and once more in reverse order.

GPUs at their power limit do not run at one speed: their clock depends on how warm they are, and so a layout's time
depends on when it was measured. If the clock changes steadily, the mean of a layout's two times is that of the moment
in the middle, the same for all layouts. In the second half only the fastest size of micro-batches is timed, and only
there is the cost of communication measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.layouts.micro_batches import Row, best
from benchmarks.layouts.run_queue import QueuedRun
from benchmarks.layouts.timing import Timing
from ds_ring.config import RunConfig

_FALL_WITH_TIME = ("tps", "tps_per_gpu", "mfu")
_RISE_WITH_TIME = ("tpot_ms", "token_latency_us")
_MEANS = ("sm_clock_mhz", "power_w", "temperature_c", "energy_j", "link_awake")


def first_half(runs: Sequence[tuple[Path, RunConfig]]) -> list[tuple[Path, RunConfig]]:
    """``runs`` in order, without the passes that measure the cost of communication."""
    return [(file, RunConfig.load(run, speed_only=True)) for file, run in runs]


def second_half(runs: Sequence[tuple[Path, RunConfig]], rows: Sequence[Row]) -> list[QueuedRun]:
    """``runs`` in reverse order, each at the fastest size of micro-batches by the first half's ``rows``."""
    found = []
    for file, run in reversed(runs):
        lengths: dict[int, set[int]] = {}
        for row in best([row for row in rows if row["layout"] == run.label]):
            lengths.setdefault(row["micro_batch"], set()).add(row["length"])
        for size, own in sorted(lengths.items(), reverse=True):
            workload: dict[str, Any] = {"max_length": max(own), "sweep": tuple(sorted(own))}
            again = RunConfig.load(run, micro_batch_size=size, micro_batch_sizes=(), **workload)
            found.append(QueuedRun(file, again, suffix=f".back{size}"))
    return found


def averaged(rows: Sequence[Row], again: Sequence[Row]) -> list[Row]:
    """The first half's ``rows``, each with the mean of its time and that in ``again``, the second half's.

    Only the fastest size of micro-batches is averaged. ``ways_ms`` of such a row lists both medians.
    """
    second = {_case(row): row for row in again}
    fastest = {_case(row) for row in best(list(rows))}
    return [_mean(row, second[case]) if (case := _case(row)) in fastest and case in second else row for row in rows]


def _case(row: Row) -> tuple[str, int, int, str]:
    return row["layout"], row["micro_batch"], row["length"], row["mode"]


def _mean(first: Row, second: Row) -> Row:
    step = (first["step_ms"] + second["step_ms"]) / 2
    longer = step / first["step_ms"]
    # Measured in the second half only. Exposed communication is kept as a share of the step.
    apart = {name: x for name, x in second.items() if name == "comm_alone_ms" or name.startswith("muted_")}
    if (exposed := second["comm_exposed_ms"]) is not None:
        apart["comm_exposed_ms"] = exposed * step / second["step_ms"]
    samples = f"{first['step_samples_ms']} {second['step_samples_ms']}"
    return {
        **first,
        "step_ms": step,
        "ways_ms": f"{first['step_ms']:.2f} {second['step_ms']:.2f}",
        "step_samples_ms": samples,
        "step_spread": Timing(list(map(float, samples.split()))).spread,
        **{name: first[name] / longer for name in _FALL_WITH_TIME},
        **{name: first[name] * longer for name in _RISE_WITH_TIME},
        **apart,
        **{name: (first[name] + second[name]) / 2 for name in _MEANS if name in first and name in second},
    }
