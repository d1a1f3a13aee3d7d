"""Ranks end themselves when their launcher is gone. Otherwise they would hold GPUs and hosts for nothing.

``deepspeed`` starts ``launch.py``, which starts the ranks. If the first is killed, the other two are orphans; if the
second is killed, the ranks are. Neither kill reaches them.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PERIOD_S = 1.0


@cache
def end_with_launcher() -> None:
    """From now on, in a launched rank, end the process when its parent or grandparent ends. Linux only.

    The grandparent is watched under DeepSpeed's launcher only: under another it may be a shell, whose end means
    nothing. Only the first call of a process counts: later even a process that nobody launched has a rank.
    """
    parent = os.getppid()
    grandparent = parent_of(parent)
    if "LOCAL_RANK" not in os.environ or grandparent is None:
        return
    watch_both = "deepspeed.launcher.launch" in command_of(parent)

    def watch() -> None:
        while os.getppid() == parent and (not watch_both or parent_of(parent) == grandparent):
            time.sleep(PERIOD_S)
        print(f"rank {os.environ.get('RANK')}: the launcher is gone, ending", file=sys.stderr, flush=True)
        if os.getppid() == parent:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(parent, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end_with_launcher").start()


def parent_of(pid: int) -> int | None:
    """The parent of process ``pid``; None where the process is gone, and on other systems than Linux."""
    found = _state_and_parent(pid)
    return found[1] if found else None


@dataclass(frozen=True)
class Sibling:
    """Another rank that this rank's launcher started."""

    pid: int
    rank: str
    stopped: bool


def siblings() -> list[Sibling]:
    """The other ranks of this launch on this host. Empty on other systems than Linux."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        status = _state_and_parent(pid)
        if status is None or status[1] != os.getppid() or pid == os.getpid():
            continue
        with suppress(OSError):
            environment = (folder / "environ").read_bytes().split(b"\0")
            rank = next((entry[5:].decode() for entry in environment if entry.startswith(b"RANK=")), None)
            if rank is not None:
                found.append(Sibling(pid, rank, status[0] == "T"))
    return found


def command_of(pid: int) -> list[str]:
    """The words of a process's command line; empty where the process is gone, and on other systems than Linux."""
    try:
        return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")[:-1]
    except OSError:
        return []


def _state_and_parent(pid: int) -> tuple[str, int] | None:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # pid (name) state parent …; the name may contain anything, parentheses and blanks included.
    state, parent, *_ = status.rpartition(")")[2].split()
    return state, int(parent)
