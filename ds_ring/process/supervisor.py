"""DeepSpeed's launcher as a child of ours: signals are passed on, and its end is judged by what ranks told.

The child is the first of a session of its own, so all that it starts can be ended together; it ends with this process
whatever ends this one (``process/keeper.py``). What it and the ranks print on standard output goes to standard error,
where it does not mix with the result.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import FrameType

from ds_ring.process.interruption import SIGNALS, Interrupted
from ds_ring.process.keeper import Keeper, kill_all, tree_of
from ds_ring.process.outcome import NO_STDOUT, OURS, Outcomes
from ds_ring.process.run_watch import RunWatch
from ds_ring.utils.streams import print_result

CommandOf = Callable[[Mapping[str, str]], Sequence[str]]
PERIOD_S, ASK_EVERY_S = 0.2, 1.0
GRACE_S = 10.0
"""Seconds between asking processes to end and killing them."""


def supervise(command: Sequence[str] | CommandOf, environment: dict[str, str], timeout_s: float) -> int:
    """Run ``command`` to its end, print the result, and return this process's exit code.

    Args:
        command: its words, or what makes them of the environment variables by which ranks tell how they end.
        timeout_s: a process of the run that is stopped for longer ends it; 0: never.
    """
    with Outcomes() as outcomes, Keeper() as keeper:
        received = _Received()
        words = command(outcomes.environment) if callable(command) else command
        process = subprocess.Popen(words, env=environment | outcomes.environment, stdout=2, start_new_session=True)
        received.group = process.pid
        with keeper.group(process.pid):
            why = _wait(process, RunWatch(process.pid, outcomes, timeout_s), received)
            _end_group(process)
        if received.number is not None:
            interrupted = Interrupted(received.number)
            print(interrupted, file=sys.stderr, flush=True)
            return interrupted.exit_code
        return _judge(process, outcomes, why)


class _Received:
    """The first signal that is to end this process, passed on to the run's processes; a later one kills them."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.group: int | None = None
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._end)
        signal.signal(signal.SIGTSTP, self._stop)

    def _end(self, number: int, frame: FrameType | None) -> None:
        first, self.number = self.number is None, self.number or number
        if not first:
            self._pass_on(signal.SIGKILL)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._pass_on(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)  # and here this process goes on when it is continued
        self._pass_on(signal.SIGCONT)

    def _pass_on(self, number: int) -> None:
        if self.group is not None:
            _send(self.group, number)


def _wait(process: subprocess.Popen[bytes], watch: RunWatch, received: _Received) -> str:
    """Wait for the end of the launcher, or for a reason to end it, which is returned; empty where it ended itself."""
    why, asked_at = "", time.monotonic()
    while received.number is None and not why:
        with suppress(subprocess.TimeoutExpired):
            process.wait(PERIOD_S)
            return ""
        if time.monotonic() - asked_at > ASK_EVERY_S:
            why, asked_at = watch.reason_to_end(), time.monotonic()
    return why


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the launcher and all that it started; where it still runs, after ``GRACE_S`` seconds in which it may."""
    started = tree_of(process.pid)  # while it is there: what it leaves has other parents
    if process.returncode is None:
        _send(process.pid, signal.SIGTERM, signal.SIGCONT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    _send(process.pid, signal.SIGKILL)
    kill_all([pid for pid in started if pid != process.pid])
    process.wait()


def _send(group: int, *numbers: int) -> None:
    for number in numbers:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)


def _judge(process: subprocess.Popen[bytes], outcomes: Outcomes, why: str) -> int:
    """Print the result, if there is one, and what went wrong; returns the exit code."""
    completed, failed = outcomes.completed(), outcomes.failed()
    code = failed or 0
    # Ranks that lose their launcher may tell of a failure of theirs: the reason is the launcher.
    if completed is None and (failed is None or (failed == OURS and process.returncode <= 0)):
        ended = f"the launcher ended {_how(process.returncode)} and without a result"
        # It returns 0 where it lost a process of its own, and 256 - n where a rank died of signal n.
        killed = "" if 0 < process.returncode < 128 else ": a process of the run was killed"
        print(f"failed: {why or ended + killed}", file=sys.stderr, flush=True)
        code = OURS
    elif completed is not None and failed is None and process.returncode > 0:
        print(f"failed: after the result the launcher ended {_how(process.returncode)}", file=sys.stderr, flush=True)
        code = OURS
    if completed is not None and completed.result is not None:
        try:
            print_result(completed.result)
        except OSError as error:
            print(f"failed: standard output could not be written: {error.strerror}", file=sys.stderr, flush=True)
            code = code or NO_STDOUT
    return code


def _how(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
