"""``ds-ring`` and ``compare`` whose processes are killed: the exit code, what is left, and what of results is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.helpers.launching import ROOT, environment, save_llama
from tests.helpers.limits import HANG_S
from tests.helpers.processes import runs, wait_until

pytestmark = pytest.mark.launch

ENDLESS = ["--dtype", "fp32", "--ring-degree", 2, "--repeats", 1_000_000, "--max-length", 100]
BEFORE = json.dumps({"rows": ["before"]})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@contextmanager
def started(folder: Path, *command: object, begun: str) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A command of ours that has said ``begun``, and everything below it, from the launcher on."""
    said = folder / "said"
    with said.open("w") as err, (folder / "out").open("w") as out:
        process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env={**environment(), "TMPDIR": str(folder)}, stdout=out, stderr=err
        )  # fmt: skip
    below: list[psutil.Process] = []
    try:
        wait_until(lambda: begun in said.read_text() or process.poll() is not None)
        assert process.poll() is None, said.read_text()
        below = psutil.Process(process.pid).children(recursive=True)
        yield process, below
    finally:
        for each in (process, *below):
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()


@pytest.mark.parametrize(
    ("victim", "number", "code", "line"),
    [
        ("launch", "SIGKILL", 1, "failed: the launcher ended with exit code 0 and without a result: a process of "),
        ("ds-ring", "SIGKILL", -9, ""),
        ("ds-ring", "SIGINT", 130, "interrupted by SIGINT"),
    ],
)
def test_a_killed_run_is_no_success_and_leaves_nothing(victim, number, code, line, checkpoint, tmp_path):
    output = tmp_path / "out.json"
    output.write_text(BEFORE)
    command = [sys.executable, "-m", "ds_ring", "bench", "--model", checkpoint, "--ranks", 2, *ENDLESS]
    with started(tmp_path, *command, "--output", output, begun="timed passes") as (process, below):
        if victim == "launch":
            (pid,) = [one.pid for one in below if "deepspeed.launcher.launch" in one.cmdline()]
        else:
            pid = process.pid
        os.kill(pid, signal.Signals[number])
        assert process.wait(HANG_S) == code
        wait_until(lambda: not any(runs(one.pid) for one in below))
    assert (tmp_path / "out").read_text() == ""
    assert line in (tmp_path / "said").read_text().splitlines()[-1]
    assert "Traceback" not in (tmp_path / "said").read_text()
    assert output.read_text() == BEFORE


def test_a_killed_comparison_leaves_no_process_no_scratch_and_what_it_had(checkpoint, tmp_path):
    files = []
    for name, degrees in (("one", {}), ("two", {"ring_degree": 2})):
        section = {"model": str(checkpoint), "parallel": degrees, "workload": {"max_length": 100}}
        section["benchmark"] = {"repeats": 1}
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps({"dtype": "fp32", "ds_ring": section}))
    output = tmp_path / "out.json"
    output.write_text(BEFORE)
    command = [sys.executable, "launch/compare.py", "--layouts", *files, "--sustain-s", 3, "--output", output]
    with started(tmp_path, *command, begun="ring2, L = 100, full: 1 timed") as (process, below):
        assert list(tmp_path.glob("ds_ring.*"))
        process.kill()
        process.wait(HANG_S)
        wait_until(lambda: not any(runs(one.pid) for one in below))
        wait_until(lambda: not list(tmp_path.glob("ds_ring.*")))
    assert output.read_text() == BEFORE
    kept = json.loads((tmp_path / "out.partial.json").read_text())
    assert (kept["status"], [row["layout"] for row in kept["rows"]]) == ("partial", ["single"])
