"""Ranks end themselves when their launcher is gone. Otherwise they would hold GPUs and hosts for nothing.

A killed ``deepspeed`` leaves ``launch.py`` and the ranks, a killed ``launch.py`` the ranks; with several hosts a killed
pdsh leaves everything on all of them.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache

from ds_ring.process import guard, heartbeat, launch_tree
from ds_ring.utils.streams import last_words

PERIOD_S = 1.0
GUARD_WAITS_S = 3.0
"""The guard acts this much after the time-out: ranks that wait name the stopped one first."""


_guards: list[subprocess.Popen[bytes]] = []
"""The guard that this process started, if it did."""


@cache
def end_with_launcher() -> None:
    """From now on, in a launched rank, end the process when one of ``launch_tree.links`` breaks. Linux only.

    Only the first call of a process counts: later even a process that nobody launched has a rank.
    """
    links = launch_tree.links()
    if "LOCAL_RANK" not in os.environ or not links:
        return
    if os.environ["LOCAL_RANK"] == "0" and len(links) > 1:
        _guards.append(_start_guard(links))

    def watch() -> None:
        while all(link.holds() for link in links):
            time.sleep(PERIOD_S)
        last_words(f"rank {os.environ.get('RANK')}: the launcher is gone, ending")
        heartbeat.tell("the launcher is gone")
        # Without pdsh its ssh goes on, and with that whatever has not connected yet on another host.
        orphans = launch_tree.find("pdsh", "ssh")
        for pid in (*orphans, *([links[0].parent] if os.getppid() == links[0].parent else [])):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end_with_launcher").start()


def end_what_is_stopped(timeout_s: int) -> None:
    """From now on the guard of this host ends what has been stopped for so long: ranks, ``launch.py`` and what started
    it. 0: nothing is ended. Does nothing where another rank started the guard, or none was."""
    limit_s = timeout_s + GUARD_WAITS_S if timeout_s else math.inf
    for guard_process in _guards:
        if guard_process.stdin is not None and not guard_process.stdin.closed:
            with suppress(OSError):
                guard_process.stdin.write(str(limit_s).encode())
                guard_process.stdin.close()


def _start_guard(links: Sequence[launch_tree.Link]) -> subprocess.Popen[bytes]:
    """``guard.py`` beside this rank."""
    launch, others = links[0].parent, {pid for link in links[1:] for pid in (link.pid, link.parent)}
    words = [sys.executable, "-I", "-S", guard.__file__, launch, *sorted(others - {launch})]
    return subprocess.Popen([str(word) for word in words], env={}, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
