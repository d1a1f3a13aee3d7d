"""Counters of attention512: the profiler's output as rows, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from benchmarks.kernels import attention_profile
from benchmarks.kernels.attention_cases import Case
from ds_ring.errors import ConfigError
from ds_ring.process.launcher import ROOT
from tests.helpers.limits import HANG_S

PRINTED = """==PROF== Connected to process 1
a line of the program's own, "quoted"
==PROF== Disconnected
"ID","Kernel Name","gpu__time_duration.sum","sm__cycles_active.avg","device__attribute_name"
"","","ns","cycle",""
"0","attention512","1250000","1,234,567","H100"
"1","attention512","2500000","7","H100"
"""
CASES = [Case(512, True, 1, 16, 16, length, length) for length in (100, 200)]


def test_what_the_profiler_prints_becomes_numbers_by_metric():
    first, second = attention_profile.table(PRINTED)
    assert first == {"gpu__time_duration.sum": 1.25e6, "sm__cycles_active.avg": 1234567.0}
    assert second["gpu__time_duration.sum"] == 2.5e6
    assert list(attention_profile.table("==ERROR== nothing")) == []


def profiled(monkeypatch, printed: str, code: int = 0) -> list[dict]:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, code, printed, "==ERROR== no permission")

    monkeypatch.setattr(attention_profile.shutil, "which", lambda _: "/bin/ncu")
    monkeypatch.setattr(attention_profile.subprocess, "run", run)
    rows = attention_profile.run(CASES, "script.py", ["--calls"], lambda _: None)
    assert commands[0][-3:] == [sys.executable, "script.py", "--calls"]
    assert commands[0][commands[0].index("--clock-control") + 1] == "none"
    assert commands[0][commands[0].index("--print-units") + 1] == "base"
    return rows


def test_a_row_of_each_case(monkeypatch):
    rows = profiled(monkeypatch, PRINTED)
    assert [row["case"] for row in rows] == [case.label for case in CASES]
    assert rows[1] == {"case": CASES[1].label, "flops": CASES[1].flops, "ms": 2.5, "sm_cycles_mean": 7.0}


def test_figures_of_a_launch():
    stalled = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio".format
    reasons = {"selected": 1.0, "wait": 1.5, "long_scoreboard": 2.0, "gmma": 0.5, "a": 0.4, "b": 0.3, "c": 0.2}
    metrics = {
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": 80.0, "sm__cycles_active.avg": 1000.0,
        "gpc__cycles_elapsed.avg.per_second": 1.6e9, "launch__sm_count": 10.0, "launch__grid_size": 10.0,
        attention_profile.LATENCY: 10.0, **{stalled(name): value for name, value in reasons.items()},
    }  # fmt: skip
    found = attention_profile.figures(0.9 * 0.8 * 1000 * 10 * 4096, metrics)
    assert found.pop("useful") == pytest.approx(0.9)
    assert found.pop("stalls") == {"long scoreboard": 0.2, "wait": 0.15, "gmma": 0.05, "a": 0.04, "b": 0.03}
    assert found == pytest.approx({"sm_clock_mhz": 1600.0, "tensor_busy_active": 0.8, "sm_cycles_mean": 1000.0})


@pytest.mark.parametrize(
    ("printed", "code", "count"), [(PRINTED, 1, 2), (PRINTED.rsplit("\n", 2)[0], 0, 1), ("", 0, 0)]
)
def test_a_profile_that_failed_is_refused_with_its_reason(monkeypatch, printed, code, count):
    with pytest.raises(ConfigError, match=rf"{count} launches of 2 were profiled: .*no permission"):
        profiled(monkeypatch, printed, code)


def test_without_the_profiler_it_is_refused(monkeypatch):
    monkeypatch.setattr(attention_profile.shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match=r"ncu \(Nsight Compute\) is not on the PATH"):
        attention_profile.run(CASES, "script.py", [], lambda _: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("options", "reason"), [([], "no CUDA GPU"), (["--only", "d128"], "no case of head_dim 512")])
def test_what_cannot_be_profiled_is_refused_in_a_line(options, reason):
    command = [sys.executable, "launch/profile_attention.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {reason}")
