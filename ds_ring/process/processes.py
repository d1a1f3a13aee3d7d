"""What Linux shows of processes. Empty or None where a process is gone, and on other systems than Linux."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


def parent_of(pid: int) -> int | None:
    """The parent of process ``pid``."""
    found = _stat_of(pid)
    return found.parent if found else None


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped process ``pid``."""
    found = _stat_of(pid)
    return found is not None and found.state == "T"


def stopped_processes(session: int) -> list[int]:
    """Processes of a session that a signal has stopped."""
    found = {pid: _stat_of(pid) for pid in all_processes()}
    return [pid for pid, stat in found.items() if stat and stat.state == "T" and stat.session == session]


def command_of(pid: int) -> list[str]:
    """The words of a process's command line."""
    try:
        return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")[:-1]
    except OSError:
        return []


def name_of(pid: int) -> str:
    """The name of the program that a process runs, cut at 15 letters."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def all_processes() -> list[int]:
    return [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]


def children_of(pid: int) -> list[int]:
    return [other for other in all_processes() if parent_of(other) == pid]


@dataclass(frozen=True)
class Sibling:
    """Another rank that this rank's launcher started."""

    pid: int
    rank: str
    stopped: bool


def siblings() -> list[Sibling]:
    """The other ranks of this launch on this host."""
    found = []
    for pid in children_of(os.getppid()):
        rank = rank_of(pid)
        if pid != os.getpid() and rank is not None:
            found.append(Sibling(pid, rank, is_stopped(pid)))
    return found


def rank_of(pid: int) -> str | None:
    """The rank that a process was started as."""
    with suppress(OSError):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return next((entry[5:].decode() for entry in environment if entry.startswith(b"RANK=")), None)
    return None


@dataclass(frozen=True)
class _Stat:
    state: str
    parent: int
    session: int


def _stat_of(pid: int) -> _Stat | None:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # pid (name) state parent group session …; the name may contain anything, parentheses and blanks included.
    state, parent, _, session, *_ = status.rpartition(")")[2].split()
    return _Stat(state, int(parent), int(session))
