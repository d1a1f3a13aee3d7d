"""Ranks that outlive their launcher hold GPUs and hosts for nothing: they end themselves when it is gone.

``deepspeed`` starts ``launch.py``, which starts the ranks. Killing the first orphans the other two, killing the second
orphans the ranks, and neither kill reaches them.
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
    """From now on, in a launched rank, end the process when either process above it ends. Linux only; else nothing.

    Above another launcher than DeepSpeed's may be a shell, whose end is none of a rank's business. Only the first call
    counts: later on even a process that nobody launched has a rank.
    """
    parent = os.getppid()
    grandparent = parent_of(parent)
    if "LOCAL_RANK" not in os.environ or grandparent is None:
        return
    two = "deepspeed.launcher.launch" in words_of(parent)

    def watch() -> None:
        while os.getppid() == parent and (not two or parent_of(parent) == grandparent):
            time.sleep(PERIOD_S)
        print(f"rank {os.environ.get('RANK')}: the launcher is gone, ending", file=sys.stderr, flush=True)
        if os.getppid() == parent:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(parent, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end_with_launcher").start()


def parent_of(pid: int) -> int | None:
    """The parent of a process; None where it is gone or this system does not say."""
    found = _state_and_parent(pid)
    return found[1] if found else None


@dataclass(frozen=True)
class Sibling:
    """Another rank that this rank's launcher started."""

    pid: int
    rank: str
    stopped: bool


def siblings() -> list[Sibling]:
    """The other ranks of this host, as far as this system tells."""
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


def words_of(pid: int) -> list[str]:
    """A process's command; empty where it is gone or this system does not say."""
    try:
        return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")[:-1]
    except OSError:
        return []


def _state_and_parent(pid: int) -> tuple[str, int] | None:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # pid (name) state parent …; the name may hold anything, parentheses and blanks included.
    state, parent, *_ = status.rpartition(")")[2].split()
    return state, int(parent)
