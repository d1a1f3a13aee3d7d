"""The processes that a rank owes its start to, as far as this host shows them.

    on one host          deepspeed ► launch.py ► rank
    on several, by pdsh  deepspeed ► pdsh ► ssh   ···   sshd ► (shell ►) launch.py ► rank

In the second case the first half is on the launcher's host only, and no ancestor of a rank. It is found by what
``launch.py`` and pdsh have in common: the hosts and the port in their command lines.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ds_ring.process.hosts import world_of
from ds_ring.process.processes import all_processes, command_of, name_of, parent_of

LAUNCH = "deepspeed.launcher.launch"


@dataclass(frozen=True)
class Link:
    """A process that must go on, and the parent that it must keep."""

    pid: int
    parent: int

    def holds(self) -> bool:
        return parent_of(self.pid) == self.parent


def links() -> list[Link]:
    """The links whose end means that nobody waits for this rank any longer; on other systems than Linux none.

    Above another launcher than DeepSpeed's nothing counts: there may be a shell, whose end means nothing.
    """
    pid, parent = os.getpid(), os.getppid()
    if parent_of(pid) is None:
        return []
    chain = [Link(pid, parent)]
    if LAUNCH not in command_of(parent):
        return chain
    kept = _above(parent)
    chain += [Link(child, ancestor) for child, ancestor in zip([parent, *kept], kept, strict=False)]
    pdsh = find_pdsh()
    return [*chain, Link(pdsh, parent_of(pdsh) or 0)] if pdsh is not None else chain


def find_pdsh() -> int | None:
    """The pdsh of this launch, where it runs on this host."""
    return next(iter(find("pdsh")), None)


def lost_hosts() -> list[str]:
    """Hosts of this launch on which everything has ended: pdsh is here and goes on, and its ssh to them does not."""
    hosts = world_of(command_of(os.getppid()))
    if len(hosts) < 2 or find_pdsh() is None:
        return []
    reached = {word for pid in find("ssh") for word in command_of(pid)}
    return [host for host in hosts if host not in reached]


def find(*programs: str) -> list[int]:
    """Processes of this host, of programs by these names, that start ``launch.py`` on this launch's hosts and port."""
    own = {word for word in command_of(os.getppid()) if word.startswith(("--world_info=", "--master_port="))}
    if len(own) < 2:
        return []
    commands = {pid: command_of(pid) for pid in all_processes()}
    return [
        pid
        for pid, command in commands.items()
        if command and Path(command[0]).name in programs and own <= set(" ".join(command).split())
    ]


def _above(launch: int) -> list[int]:
    """What counts above ``launch.py``: its runner; or an sshd, with the shell that it started if there is one."""
    first = parent_of(launch) or 0
    if any(LAUNCH in word for word in command_of(first)) and (server := parent_of(first)) and _is_sshd(server):
        return [first, server]
    # Not what is above a runner: a user may start it in an ssh session, and leave that.
    return [first]


def _is_sshd(pid: int) -> bool:
    return name_of(pid).startswith("sshd")
