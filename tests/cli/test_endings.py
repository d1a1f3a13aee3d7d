"""How a command ends: the exit code, what is on both streams and in the file, whatever becomes of each of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ds_ring.process.launcher import ROOT
from tests.helpers.limits import HANG_S
from tests.helpers.processes import wait_until

COMMAND = """
import os, sys, time
from pathlib import Path
from ds_ring.cli import options
from ds_ring.errors import *
from ds_ring.process.keeper import scratch_folder
from ds_ring.utils import results

def rows(count):
    for number in range(count):
        yield {"row": number}
    Path("ready").touch()
    if count > 1:
        time.sleep(3600)

def work(args):
    options.say("progress")
    print("noise", file=sys.stderr)
    if args.model:
        return eval(args.model)
    return results.collect({}, rows(args.batch_size or 1), args.output)

def fail(error):
    raise error

options.main(work, options.run_parser("A command."))
"""
RESULT = {"rows": [{"row": 0}], "status": "complete"}


@pytest.fixture
def start(tmp_path):
    """Starts the command in a folder of its own, by a shell that leads its streams where ``shell`` says."""
    script = tmp_path / "command.py"
    script.write_text(COMMAND)

    def started(*words: object, shell: str = "") -> subprocess.Popen[str]:
        how = "set -o pipefail;" if shell.startswith("|") else "exec"
        line = ["bash", "-c", f'{how} "$@" {shell}', "bash", sys.executable, str(script), *map(str, words)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        return subprocess.Popen(line, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe, text=True)

    return started


@pytest.fixture
def run(start):
    def ended(*words: object, shell: str = "") -> tuple[int, list[str], list[str]]:
        process = start(*words, shell=shell)
        out, err = process.communicate(timeout=HANG_S)
        return process.returncode, out.splitlines(), err.splitlines()

    return ended


SAID = ["[ds_ring] progress", "noise"]


def test_a_result_is_printed_and_written(run, tmp_path):
    code, (line,), said = run("--output", "out.json")
    assert (code, json.loads(line), said) == (0, RESULT, SAID)
    assert json.loads((tmp_path / "out.json").read_text()) == RESULT


@pytest.mark.parametrize(
    ("shell", "why"),
    [(">/dev/full", "No space left on device"), (">&-", "Bad file descriptor"), ("| true", "Broken pipe")],
    ids=["full", "closed", "not read"],
)
def test_what_becomes_of_standard_output_does_not_touch_the_file(shell, why, run, tmp_path):
    code, out, said = run("--output", "out.json", shell=shell)
    assert (code, out, said) == (5, [], [*SAID, f"failed on rank 0: standard output could not be written: {why}"])
    assert json.loads((tmp_path / "out.json").read_text()) == RESULT


@pytest.mark.parametrize("shell", ["2>/dev/full", "2>&-", "2>&- <&-"])
def test_what_becomes_of_standard_error_ends_nothing(shell, run, tmp_path):
    code, (line,), _ = run("--output", "out.json", shell=shell)
    assert (code, json.loads(line)) == (0, RESULT)
    assert json.loads((tmp_path / "out.json").read_text()) == RESULT


def test_a_file_that_cannot_be_written_does_not_touch_standard_output(run):
    code, (line,), said = run("--output", "/dev/full")
    said_of_file = "failed on rank 0: /dev/full could not be written: No space left on device"
    assert (code, json.loads(line)) == (4, RESULT)
    assert said == [*SAID, said_of_file]
    code, out, said = run("--output", "/dev/full", shell=">/dev/full")
    assert (code, out, said[-2:-1]) == (4, [], [said_of_file])


def test_a_fifo_gets_one_document(start, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    process = start("--output", "fifo")
    assert json.loads(fifo.read_text()) == RESULT
    out, _ = process.communicate(timeout=HANG_S)
    assert (process.returncode, json.loads(out)) == (0, RESULT)
    assert fifo.is_fifo()


def test_help_that_cannot_be_printed(run):
    assert run("--help")[0] == 0
    assert run("--help", shell=">/dev/full") == (5, [], [])


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_is_one_line_and_what_there_was_is_kept(name, start, tmp_path):
    before = json.dumps({"rows": ["before"]})
    (tmp_path / "out.json").write_text(before)
    process = start("--output", "out.json", "--batch-size", 2)
    wait_until((tmp_path / "ready").exists)
    process.send_signal(signal.Signals[name])
    out, err = process.communicate(timeout=HANG_S)
    kept = [f"interrupted by {name}", "rows so far are in out.partial.json"]
    assert (process.returncode, out, err.splitlines()) == (128 + signal.Signals[name], "", [*SAID, *kept])
    assert (tmp_path / "out.json").read_text() == before
    rows = [{"row": 0}, {"row": 1}]
    assert json.loads((tmp_path / "out.partial.json").read_text()) == {"rows": rows, "status": "partial"}
    assert sorted(file.name for file in tmp_path.glob("*out*")) == ["out.json", "out.partial.json"]


def test_a_signal_that_is_ignored_stays_so(start, tmp_path):
    process = start("--model", "(Path('ready').touch(), time.sleep(1), {})[-1]", shell="")
    wait_until((tmp_path / "ready").exists)
    assert process.wait(HANG_S) == 0
    (tmp_path / "ready").unlink()
    nohup = subprocess.Popen(
        ["nohup", sys.executable, tmp_path / "command.py", "--model", "(Path('ready').touch(), time.sleep(1), {})[-1]"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_until((tmp_path / "ready").exists)
    nohup.send_signal(signal.SIGHUP)
    assert nohup.wait(HANG_S) == 0


@pytest.mark.parametrize(
    ("work", "code", "said"),
    [
        ("fail(InputError('a\\n  b\\x1b[31m'))", 2, [r"error: a b\x1b[31m"]),
        ("fail(DsRingError('a\\nb'))", 1, ["failed on rank 0: a b"]),
        ("fail(OutputError('x could not be written'))", 4, ["failed on rank 0: x could not be written"]),
        ("fail(MemoryError('out'))", 3, ["out of memory on rank 0: out", "Traceback (most recent call last):"]),
        ("fail(KeyError('a'))", 1, ["failed on rank 0: KeyError: 'a'", "Traceback (most recent call last):"]),
        ("fail(options.Refused('no', {'checks': []}))", 2, ["error: no"]),
        ("{'nll': float('nan')}", 1, ["failed on rank 0: nll is nan, which is no result and no JSON"]),
        ("{'a': '\\udc80é'}", 0, []),
    ],
)
def test_errors_and_what_they_leave(work, code, said, run, tmp_path):
    (tmp_path / "out.json").write_text("before")
    done = run("--model", work, "--output", "out.json")
    assert (done[0], done[2][2 : 2 + len(said)]) == (code, said)
    result = {"checks": []} if code == 2 and "checks" in work else {"a": "\udc80é"} if code == 0 else None
    assert [json.loads(line) for line in done[1]] == ([{**result, "status": "complete"}] if result else [])
    written = (tmp_path / "out.json").read_text()
    assert json.loads(written) == {**result, "status": "complete"} if result else written == "before"


def test_outputs_are_looked_at_before_any_work(run, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    Path(tmp_path / "out.partial.json").write_text("of an earlier run")
    for words, why in (
        (["--config", "config.json", "--output", "config.json"], "--output config.json is what --config names"),
        (["--output", "none/\x1b[1m" + "x" * 300], r"--output none/\x1b[1mxxx"),
        (["--outptu", "a"], "unrecognized arguments: --outptu a; --help lists the options"),
    ):
        code, out, (line,) = run(*words)
        assert (code, out, line.startswith(f"error: {why}")) == (2, [], True), line
    code, out, (line,) = run("--output", "out.json", shell=">out.json")
    assert (code, line) == (
        2,
        "error: --output out.json is standard output, which gets the result anyway; leave it out",
    )
    left = tmp_path / f".ds_ring.{os.uname().nodename}.{2**22 + 1}.abc"
    left.write_text("of a killed run")
    assert run("--output", "out.json")[0] == 0
    assert not (tmp_path / "out.partial.json").exists()
    assert not left.exists()
