"""A GPU's counters for one call of attention512 of each case: Nsight Compute runs a process that makes the calls.

For its counters Nsight Compute replays a kernel with pauses between, at a clock that sustained calls do not reach. So
rates are taken from ``attention_run.py``, never from here.
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.kernels import attention_implementations
from benchmarks.kernels.attention_cases import Case, make_inputs
from ds_ring.errors import ConfigError
from ds_ring.process.launcher import ROOT

KERNEL = "attention512"
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "WarpStateStats", "MemoryWorkloadAnalysis")

METRICS = {
    "ms": ("gpu__time_duration.sum", 1e6),
    "sm_clock_mhz": ("gpc__cycles_elapsed.avg.per_second", 1e6),
    "tensor_busy": ("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed", 100.0),
    "tensor_busy_active": ("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active", 100.0),
    "sm_cycles_least": ("sm__cycles_active.min", 1.0),
    "sm_cycles_mean": ("sm__cycles_active.avg", 1.0),
    "sm_cycles_most": ("sm__cycles_active.max", 1.0),
    "issue_busy": ("sm__issue_active.avg.pct_of_peak_sustained_elapsed", 100.0),
    "l1_busy": ("l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed", 100.0),
    "l2_busy": ("lts__throughput.avg.pct_of_peak_sustained_elapsed", 100.0),
    "l2_hit": ("lts__t_sector_hit_rate.pct", 100.0),
    "dram_busy": ("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed", 100.0),
}
"""The metrics of a row, of hundreds: by our name, Nsight Compute's name and the number that its value is divided by.

``..._busy``: a share of the cycles of the whole launch. ``tensor_busy_active``: of the cycles in which an SM had a CTA.
``sm_cycles_...``: these cycles of the first SM to finish, of the mean SM and of the last. ``l1_busy``: the data pipe of
L1 and shared memory.
"""

FLOP_PER_CYCLE = 4096
"""Of one SM's tensor cores, fp16, dense. From NVIDIA's white paper on the H100: 989.4 TFLOP/s, 132 SMs, 1830 MHz."""

STALLED = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
LATENCY = "smsp__average_warp_latency_per_inst_issued.ratio"
STALLS = 5


def calls(cases: Iterable[Case], device: torch.device) -> None:
    """Call the kernel twice for each case. Only the second call is profiled."""
    for case in cases:
        prepared = attention_implementations.implementations(case, device)["ds_ring"](make_inputs(case, device))
        prepared.call()
        torch.cuda.synchronize(device)
        torch.cuda.profiler.start()
        prepared.call()
        torch.cuda.synchronize(device)
        torch.cuda.profiler.stop()


def run(cases: Sequence[Case], script: str, options: Sequence[str], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row of ``figures`` for each case.

    Args:
        script: a script that makes the ``calls`` of these cases when it is run with ``options``.

    Raises:
        ConfigError: Nsight Compute is missing or cannot read counters, or the calls launched another kernel.
    """
    found = shutil.which("ncu")
    if found is None:
        raise ConfigError("ncu (Nsight Compute) is not on the PATH")
    sections = [word for name in SECTIONS for word in ("--section", name)]
    # By default the profiler fixes clocks. It must not here.
    profiler = [found, "--clock-control", "none", "--profile-from-start", "off", *sections]
    profiler += ["--csv", "--page", "raw", "--print-units", "base"]
    command = [*profiler, "--kernel-name", f"regex:{KERNEL}", sys.executable, script, *options]
    say(" ".join(command))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    launches = list(table(done.stdout))
    if done.returncode or len(launches) != len(cases):
        told = (done.stdout + done.stderr).strip().splitlines()[-3:]
        raise ConfigError(f"{len(launches)} launches of {len(cases)} were profiled: {' '.join(told)}")
    return [{"case": c.label, "flops": c.flops, **figures(c.flops, m)} for c, m in zip(cases, launches, strict=True)]


def figures(flops: float, metrics: dict[str, float]) -> dict[str, Any]:
    """``METRICS`` of a launch, as far as this profiler has them, and two derived figures.

    ``useful``: the case's FLOPs ÷ what the tensor pipe can do in the cycles in which it worked. The rest is padding of
    blocks, and what masks hide. ``stalls``: the most frequent reasons for which warps do not issue an instruction, as
    shares of the time of all warps, those that only load included.
    """
    row: dict[str, Any] = {name: metrics[full] / unit for name, (full, unit) in METRICS.items() if full in metrics}
    sms = metrics.get("launch__sm_count")
    busy = row.get("tensor_busy_active", 0.0) * row.get("sm_cycles_mean", 0.0)
    if sms and busy:
        row["useful"] = flops / (sms * busy * FLOP_PER_CYCLE)
    stalls = {m[1].replace("_", " "): value for name, value in metrics.items() if (m := STALLED.fullmatch(name))}
    stalls.pop("selected", None)  # not a stall: it issues
    if latency := metrics.get(LATENCY):
        longest = sorted(stalls, key=stalls.__getitem__, reverse=True)[:STALLS]
        row["stalls"] = {reason: stalls[reason] / latency for reason in longest}
    return row


def table(text: str) -> Iterator[dict[str, float]]:
    """The numbers of each launch by metric, from the output of ``ncu --csv --page raw``.

    After the program's own output it has a line of names, a line of units, and a line for each launch."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    names, *rest = list(csv.reader(lines)) or [[]]
    for row in rest[1:]:
        values = {name: _number(value) for name, value in zip(names, row, strict=True) if "__" in name}
        yield {name: value for name, value in values.items() if value is not None}


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None
