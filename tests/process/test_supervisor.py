"""``supervise``: a launcher as a child, whose end is judged by what ranks told. Launchers here are short scripts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from ds_ring.process.launcher import ROOT
from ds_ring.process.processes import is_stopped
from tests.helpers.limits import HANG_S
from tests.helpers.processes import runs, wait_until

SUPERVISE = """
import sys
from ds_ring.process import child, run_watch, supervisor
from ds_ring.process.interruption import Interrupted, raise_on_signals
from ds_ring.utils.streams import prepare_streams
import os
run_watch.LEAVING_S, child.GRACE_S, child.ASK_EVERY_S = 0.5, 1.0, 0.1
prepare_streams()
raise_on_signals()
words = [sys.executable, "-c", sys.argv[1], *sys.argv[3:]]
try:
    code = supervisor.supervise(words, dict(os.environ), float(sys.argv[2]))
except Interrupted as interrupted:
    print(interrupted, file=sys.stderr)
    code = interrupted.exit_code
sys.exit(code)
"""
LAUNCHER = """
import os, signal, subprocess, sys, time
from pathlib import Path
from ds_ring.process.outcome import tell
def rank(number, code, result=None):
    os.environ["RANK"] = str(number)
    tell(code, result)
def kill(number):
    os.kill(os.getpid(), number)
"""
DONE = """rank(1, 0); rank(0, 0, '{"ring": 2}');"""


def supervised(code: str, *words: object, timeout_s: float = 0, shell: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SUPERVISE, LAUNCHER + code, str(timeout_s), *map(str, words)]
    line = ["bash", "-c", f'exec "$@" {shell}', "bash", *command]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(code: str, *words: object, **options: object) -> tuple[int, str, list[str]]:
    process = supervised(code, *words, **options)
    out, err = process.communicate(timeout=HANG_S)
    return process.returncode, out, err.splitlines()


RESULT = '{"ring": 2}\n'
KILLED = "failed: the launcher ended {} and without a result: a process of the run was killed"


@pytest.mark.parametrize(
    ("code", "expected", "out", "said"),
    [
        (f"print('noise'); {DONE}", 0, RESULT, ["noise"]),
        ("pass", 1, "", [KILLED.format("with exit code 0")]),
        ("rank(1, 0)", 1, "", [KILLED.format("with exit code 0")]),
        ("sys.exit(247)", 1, "", [KILLED.format("with exit code 247")]),
        ("sys.exit(1)", 1, "", ["failed: the launcher ended with exit code 1 and without a result"]),
        ("kill(9)", 1, "", [KILLED.format("by SIGKILL")]),
        (f"{DONE} kill(9)", 0, RESULT, []),
        (f"{DONE} sys.exit(1)", 1, RESULT, ["failed: after the result the launcher ended with exit code 1"]),
        (f"{DONE} time.sleep(3600)", 0, RESULT, []),
        ("rank(1, 1); rank(2, 3); rank(0, 1); sys.exit(1)", 3, "", []),
        ("rank(0, 2); rank(1, 2); kill(9)", 2, "", []),
        ("rank(0, 1); rank(1, 1)", 1, "", [KILLED.format("with exit code 0")]),
        ("rank(0, 1); sys.exit(1)", 1, "", []),
        ("""rank(0, 4, '{"ring": 2}'); sys.exit(4)""", 4, RESULT, []),
        ("""open(os.environ["DS_RING_OUTCOME"], "a").write('{"rank": 0, "co')""", 1, "",
         [KILLED.format("with exit code 0")]),
    ],
)  # fmt: skip
def test_the_exit_code_and_standard_output_go_by_what_ranks_told(code, expected, out, said):
    assert ended(code) == (expected, out, said)


@pytest.mark.parametrize(
    ("shell", "why"), [(">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")], ids=[">full", ">&-"]
)
def test_standard_output_that_cannot_be_written_is_said(shell, why):
    assert ended(DONE, shell=shell) == (5, "", [f"failed: standard output could not be written: {why}"])


def test_a_full_or_closed_standard_error_ends_nothing():
    for shell in ("2>/dev/full", "2>&-"):
        assert ended(DONE, shell=shell)[:2] == (0, RESULT)


# The child ignores what a launcher passes on, as a rank inside PyTorch would.
WAITS = """
child = subprocess.Popen([sys.executable, "-c", "import signal, time, sys\\nsignal.signal(15, signal.SIG_IGN)\\n"
    "open(sys.argv[1] + '.child', 'w')\\ntime.sleep(3600)", sys.argv[1]])
while not os.path.exists(sys.argv[1] + ".child"): time.sleep(0.01)
Path(sys.argv[1] + ".partial").write_text(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".partial", sys.argv[1])
time.sleep(3600)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGKILL"])
def test_a_signal_ends_all_and_is_said_in_one_line(name, tmp_path):
    number, said = signal.Signals[name], tmp_path / "said"
    process = supervised(WAITS, said)
    wait_until(said.exists)
    pids = list(map(int, said.read_text().split()))
    assert all(map(runs, pids))
    process.send_signal(number)
    out, err = process.communicate(timeout=HANG_S)
    killed = name == "SIGKILL"
    assert (process.returncode, out, err) == (
        -9 if killed else 128 + number, "", "" if killed else f"interrupted by {name}\n"
    )  # fmt: skip
    wait_until(lambda: not any(map(runs, pids)))


def test_a_user_stops_and_continues_a_run_with_its_command(tmp_path):
    """By Ctrl-Z and fg at a terminal, which reach the command alone: the run has a session of its own."""
    said = tmp_path / "said"
    process = supervised(WAITS, said)
    wait_until(said.exists)
    pids = [process.pid, *map(int, said.read_text().split())]
    process.send_signal(signal.SIGTSTP)
    wait_until(lambda: all(map(is_stopped, pids)))
    process.send_signal(signal.SIGCONT)
    wait_until(lambda: not any(map(is_stopped, pids)))
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=HANG_S) == ("", "interrupted by SIGINT\n")
    assert process.returncode == 130


def test_a_process_that_stays_stopped_ends_the_run(tmp_path):
    said = tmp_path / "said"
    process = supervised(WAITS, said, timeout_s=0.5)
    wait_until(said.exists)
    _, child = map(int, said.read_text().split())
    os.kill(child, signal.SIGSTOP)
    out, err = process.communicate(timeout=HANG_S)
    assert (process.returncode, out) == (1, "")
    assert err == f"failed: process {child} of the run was stopped for 0 s\n"
    assert not runs(child)


def test_a_result_is_passed_on_as_it_is(tmp_path):
    text = json.dumps({"text": "é\n" * 100_000})
    (tmp_path / "result").write_text(text)
    assert ended("rank(0, 0, open(sys.argv[1]).read())", tmp_path / "result") == (0, f"{text}\n", [])
