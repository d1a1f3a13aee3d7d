"""A comparison's way back: every layout once more, last to first, each at its fastest size of micro-batches.

GPUs at their power limit do not run at one speed: the clock depends on how warm they are, and so a layout's time on
when it was measured. There and back, the mean of a layout's two times belongs to the moment in the middle, the same for
all, as far as the change is steady. What communication costs is measured on the way back alone: of what counts, and of
no other size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.layouts.micro_batches import Row, best
from benchmarks.layouts.run_queue import Job
from benchmarks.layouts.timing import Timing
from ds_ring.config import RunConfig

_FALL_WITH_TIME = ("tps", "tps_per_gpu", "mfu")
_RISE_WITH_TIME = ("tpot_ms", "token_latency_us")
_MEANS = ("sm_clock_mhz", "power_w", "temperature_c", "energy_j", "link_awake")


def way_there(runs: Sequence[tuple[Path, RunConfig]]) -> list[tuple[Path, RunConfig]]:
    """``runs`` as the way there takes them: without what is measured on the way back."""
    return [(file, RunConfig.load(run, speed_only=True)) for file, run in runs]


def jobs(runs: Sequence[tuple[Path, RunConfig]], rows: Sequence[Row]) -> list[Job]:
    """What is run on the way back, for all ``rows`` of the way there."""
    found = []
    for file, run in reversed(runs):
        lengths: dict[int, set[int]] = {}
        for row in best([row for row in rows if row["layout"] == run.label]):
            lengths.setdefault(row["micro_batch"], set()).add(row["length"])
        for size, those in sorted(lengths.items(), reverse=True):
            workload: dict[str, Any] = {"max_length": max(those), "sweep": tuple(sorted(those))}
            again = RunConfig.load(run, micro_batch_size=size, micro_batch_sizes=(), **workload)
            found.append(Job(file, again, suffix=f".back{size}"))
    return found


def averaged(rows: Sequence[Row], again: Sequence[Row]) -> list[Row]:
    """``rows``, with ``again`` in those that it repeats: ``ways_ms`` lists the medians of both."""
    back = {_case(row): row for row in again}
    stand = {_case(row) for row in best(list(rows))}
    return [_mean(row, back[case]) if (case := _case(row)) in stand and case in back else row for row in rows]


def _case(row: Row) -> tuple[str, int, int, str]:
    return row["layout"], row["micro_batch"], row["length"], row["mode"]


def _mean(there: Row, back: Row) -> Row:
    step = (there["step_ms"] + back["step_ms"]) / 2
    longer = step / there["step_ms"]
    # What was measured on the way back alone; what shows is kept as the part of the step that it was there.
    apart = {name: x for name, x in back.items() if name == "comm_alone_ms" or name.startswith("muted_")}
    if (exposed := back["comm_exposed_ms"]) is not None:
        apart["comm_exposed_ms"] = exposed * step / back["step_ms"]
    samples = f"{there['step_samples_ms']} {back['step_samples_ms']}"
    return {
        **there,
        "step_ms": step,
        "ways_ms": f"{there['step_ms']:.2f} {back['step_ms']:.2f}",
        "step_samples_ms": samples,
        "step_spread": Timing(list(map(float, samples.split()))).spread,
        **{name: there[name] / longer for name in _FALL_WITH_TIME},
        **{name: there[name] * longer for name in _RISE_WITH_TIME},
        **apart,
        **{name: (there[name] + back[name]) / 2 for name in _MEANS if name in there and name in back},
    }
