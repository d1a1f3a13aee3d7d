"""A process that was stopped and continued: the time in between counts for nobody's time-out."""

import signal
import subprocess
import sys

import pytest

from ds_ring.process import pauses, run_watch, watchdog
from ds_ring.process.launcher import ROOT
from ds_ring.process.outcome import Outcomes
from ds_ring.process.pauses import Pauses
from ds_ring.process.run_watch import RunWatch
from ds_ring.process.watchdog import NoActivity, Watchdog
from tests.helpers.limits import HANG_S


@pytest.fixture
def clock(monkeypatch):
    """``time.monotonic``, which stands still until it is set."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    made = Clock()
    for module in (pauses, run_watch, watchdog):
        monkeypatch.setattr(module.time, "monotonic", made.monotonic)
    return made


def test_a_pause_is_noticed_once(clock):
    watched = Pauses()
    clock.now += pauses.PAUSE_S
    assert (watched.look(), watched.over_at) == (False, float("-inf"))
    clock.now += pauses.PAUSE_S + 0.1
    assert (watched.look(), watched.over_at) == (True, clock.now)
    assert watched.look() is False


def test_a_call_is_not_late_by_the_time_in_which_the_rank_was_stopped(clock):
    watched = Watchdog(NoActivity(), 30)
    with watched.watch("generate"):
        for _ in range(20):
            clock.now += 1
            watched._pauses.look()
        assert watched.stalled_s() == 20
        clock.now += 3600
        watched._pauses.look()
        assert watched.stalled_s() == 0
        clock.now += 2
        assert watched.describe() == "no communication began for 2 s in generate (none began)"


def test_a_run_is_not_ended_for_the_time_in_which_its_command_was_stopped(clock, monkeypatch):
    monkeypatch.setattr(run_watch, "stopped_processes", lambda session: [7])
    with Outcomes() as outcomes:
        watch = RunWatch(1, outcomes, 30)
        reasons = []
        for seconds in (1, 3600, *[1] * 31):
            clock.now += seconds
            reasons.append(watch.reason_to_end())
    assert reasons == [""] * 32 + ["process 7 of the run was stopped for 30 s"]


def test_a_stopped_and_continued_rank_does_not_end_itself():
    program = """
import os, time
from ds_ring.process import pauses, watchdog
pauses.PAUSE_S, watchdog.PERIOD_S = 0.5, 0.1
os.environ["WORLD_SIZE"] = "2"
with watchdog.Watchdog(watchdog.NoActivity(), 1.5).watch("a forward"):
    print("ready", flush=True)
    time.sleep(1)
print("done", flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=HANG_S) == ("done\n", "")
    assert process.returncode == 0
