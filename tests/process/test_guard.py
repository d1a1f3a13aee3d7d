"""What a signal has stopped is ended by the guard beside it; what runs is left alone."""

import signal
import subprocess
import sys
import time

import psutil
import pytest

from ds_ring.process import guard
from tests.helpers.limits import HANG_S
from tests.helpers.processes import runs, wait_until

LAUNCH = f"""
import subprocess, sys, time
ranks = [subprocess.Popen(["sleep", "3600"]) for _ in range(2)]
guard = subprocess.Popen([sys.executable, "-I", "-S", {guard.__file__!r}, str(__import__("os").getpid())])
print(ranks[0].pid, ranks[1].pid, guard.pid, flush=True)
for child in (*ranks, guard):
    child.wait()
"""


@pytest.fixture
def launched():
    """As launch.py: (itself, its two ranks, the guard); all are ended with the test."""
    started = []

    def start(limit_s):
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        if limit_s is not None:
            process.stdin.write(str(limit_s))
            process.stdin.close()
        started.append(process)
        found = [psutil.Process(process.pid), *(psutil.Process(int(pid)) for pid in process.stdout.readline().split())]
        started.extend(found)
        return process, found

    yield start
    for process in started:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def ended(process):
    try:
        process.wait(HANG_S)
    except psutil.ZombieProcess:
        return True
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_stopped_rank_is_ended_and_its_sibling_is_not(launched):
    launch, (_, stopped, running, _) = launched(1)
    stopped.send_signal(signal.SIGSTOP)
    said = launch.stderr.readline()
    assert said == f"process {stopped.pid} was stopped for 1 s, ending it: sleep 3600 \n"
    assert ended(stopped)
    assert running.status() == psutil.STATUS_SLEEPING


def test_a_stopped_launcher_is_ended(launched):
    launch, (itself, *_) = launched(1)
    itself.send_signal(signal.SIGSTOP)
    assert launch.wait(HANG_S) == -signal.SIGKILL


def test_the_guard_ends_with_the_launcher(launched):
    launch, (itself, _, _, watching) = launched(3600)
    itself.kill()
    launch.wait(HANG_S)
    assert ended(watching)


def test_nothing_is_ended_before_a_limit_is_known_and_the_time_until_then_counts(launched):
    launch, (_, stopped, *_) = launched(None)
    stopped.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    assert stopped.status() == psutil.STATUS_STOPPED
    told = time.monotonic()
    launch.stdin.write("1")
    launch.stdin.close()
    assert ended(stopped)
    assert time.monotonic() - told < 1


def test_what_is_stopped_is_ended_at_once_where_its_launcher_ends_the_ranks(launched):
    _, (_, stopped, running, own) = launched(3600)
    stopped.send_signal(signal.SIGSTOP)
    time.sleep(1)  # the guard has begun, and one without a handler would be gone by the signal
    own.send_signal(signal.SIGTERM)
    assert ended(stopped)
    wait_until(lambda: not runs(own.pid))  # whose parent waits for a rank first, and does not reap it
    assert running.is_running()


def test_a_rank_that_is_stopped_before_it_tells_a_limit_is_ended(launched, monkeypatch, tmp_path):
    brief = tmp_path / "guard.py"
    with open(guard.__file__) as source:
        brief.write_text(source.read().replace("START_LIMIT_S = 60.0", "START_LIMIT_S = 1.0"))
    monkeypatch.setitem(globals(), "LAUNCH", LAUNCH.replace(guard.__file__, str(brief)))
    _, (_, stopped, running, _) = launched(None)
    stopped.send_signal(signal.SIGSTOP)
    assert ended(stopped)
    assert running.is_running()
