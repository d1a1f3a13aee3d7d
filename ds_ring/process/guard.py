"""Ends what a signal has stopped for too long. Run as a process of its own, beside the ranks of a host.

    python guard.py LAUNCH_PID PID…      and LIMIT_S on standard input, when it is known

A stopped process reacts to nothing but SIGKILL, and whoever waits for it waits for ever: ``launch.py`` for a rank, a
host for its ``launch.py``. Others may notice; where all ranks of a host are stopped, only this process is left to act.
It watches the children of ``launch.py``, ``launch.py`` itself and the other ``PID``s, and ends with ``launch.py``, not
with the rank that started it: what is stopped outlives the ranks, a stopped runner ``launch.py`` too.

Imports nothing of this package: it starts in milliseconds and needs little memory.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

PERIOD_S = 0.5
START_LIMIT_S = 60.0
"""The limit until it is known: a rank may be stopped before it can tell."""


def watch(launch: int, others: list[int]) -> None:
    """Kill what has been stopped for as many seconds as standard input says, until ``launch`` has ended and none of
    the others is stopped.

    SIGTERM is ``launch`` ending its ranks, for which it then waits: those that are stopped are killed at once.
    """
    seen: dict[int, int] = {}
    limit_s, is_told = START_LIMIT_S, False
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    while _state(launch) not in ("", "Z") or any(_state(pid) == "T" for pid in others):
        if asked:
            for pid in _children(launch):
                if _state(pid) == "T":
                    _kill(pid)
            if not any(_state(pid) == "T" for pid in (launch, *others)):
                return
        if not is_told and select.select([0], [], [], 0)[0]:
            is_told, limit_s = True, float(os.read(0, 100) or limit_s)
        # Counted in looks, not by the clock: whoever stops a whole launch, this process too, may continue it later.
        for pid in (launch, *others, *_children(launch)):
            seen[pid] = seen.get(pid, 0) + 1 if _state(pid) == "T" else 0
            if seen[pid] * PERIOD_S > limit_s:
                _say(f"process {pid} was stopped for {limit_s:g} s, ending it: {_command(pid)}")
                _kill(pid)
        time.sleep(PERIOD_S)


def _children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]
    except OSError:
        return []


def _state(pid: int) -> str:
    """The letter of a process's state; empty where it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", errors="replace") as file:
            return file.read().replace("\0", " ")[:200]
    except OSError:
        return "?"


def _say(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):  # whoever would have read it is gone
        return


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        return


if __name__ == "__main__":
    watch(int(sys.argv[1]), [int(word) for word in sys.argv[2:]])
