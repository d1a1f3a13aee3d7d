"""What a GPU's counters say of one call of attention512 a case: Nsight Compute around a process that makes the calls.

Counters need replays of a kernel at a clock that nothing holds down; a rate comes from ``run.py``, never from here.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from ds_ring.bench_attention import peers
from ds_ring.bench_attention.cases import Case, make_inputs
from ds_ring.errors import ConfigError
from ds_ring.launcher import ROOT

KERNEL = "attention512"
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "WarpStateStats", "MemoryWorkloadAnalysis")


def calls(cases: Iterable[Case], device: torch.device) -> None:
    """Make them: the profiler looks at one of each case, behind what a first one costs."""
    for case in cases:
        prepared = peers.implementations(case, device)["ds_ring"](make_inputs(case, device))
        prepared.call()
        torch.cuda.synchronize(device)
        torch.cuda.profiler.start()
        prepared.call()
        torch.cuda.synchronize(device)
        torch.cuda.profiler.stop()


def run(cases: Sequence[Case], script: str, options: Sequence[str], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row of each case, its ``metrics`` by their names.

    Args:
        script: makes the ``calls`` of these cases when run with ``options``.

    Raises:
        ConfigError: no Nsight Compute, one that cannot read counters, or calls that launch another kernel.
    """
    found = shutil.which("ncu")
    if found is None:
        raise ConfigError("ncu (Nsight Compute) is not on the PATH")
    sections = [word for name in SECTIONS for word in ("--section", name)]
    # Clocks are the machine's own business: the profiler must not fix them.
    profiler = [found, "--csv", "--page", "raw", "--clock-control", "none", "--profile-from-start", "off", *sections]
    command = [*profiler, "--kernel-name", f"regex:{KERNEL}", sys.executable, script, *options]
    say(" ".join(command))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    launches = list(table(done.stdout))
    if done.returncode or len(launches) != len(cases):
        told = (done.stdout + done.stderr).strip().splitlines()[-3:]
        raise ConfigError(f"{len(launches)} launches of {len(cases)} were profiled: {' '.join(told)}")
    return [{"case": case.label, "flops": case.flops, "metrics": m} for case, m in zip(cases, launches, strict=True)]


def table(text: str) -> Iterator[dict[str, float]]:
    """The numbers of each launch by metric, from what ``ncu --csv --page raw`` prints behind the program's own output:
    names, units, and a line a launch."""
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
