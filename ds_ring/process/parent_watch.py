"""Ranks end themselves when their launcher is gone. Otherwise they would hold GPUs and hosts for nothing.

A killed ``deepspeed`` leaves ``launch.py`` and the ranks, a killed ``launch.py`` the ranks; with several hosts a killed
pdsh leaves everything on all of them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import cache

from ds_ring.process import guard, heartbeat, launch_tree

PERIOD_S = 1.0
GUARD_WAITS_S = 3.0
"""The guard acts this much after the time-out: ranks that wait name the stopped one first."""


@cache
def end_with_launcher() -> None:
    """From now on, in a launched rank, end the process when one of ``launch_tree.links`` breaks. Linux only.

    Only the first call of a process counts: later even a process that nobody launched has a rank.
    """
    parent, links = os.getppid(), launch_tree.links()
    if "LOCAL_RANK" not in os.environ or not links:
        return

    def watch() -> None:
        while all(link.holds() for link in links):
            time.sleep(PERIOD_S)
        print(f"rank {os.environ.get('RANK')}: the launcher is gone, ending", file=sys.stderr, flush=True)
        heartbeat.tell("the launcher is gone")
        if os.getppid() == parent:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(parent, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end_with_launcher").start()


@cache
def end_what_is_stopped(timeout_s: int) -> None:
    """Start ``guard.py`` on the first rank of a host, for the ranks, ``launch.py`` and what started it.

    Under DeepSpeed's launcher on Linux; with ``timeout_s`` 0 nothing is ended.
    """
    links = launch_tree.links()
    if os.environ.get("LOCAL_RANK") != "0" or not timeout_s or len(links) < 2:
        return
    launch, others = links[0].parent, {pid for link in links[1:] for pid in (link.pid, link.parent)}
    limit_s = timeout_s + GUARD_WAITS_S
    words = [sys.executable, "-I", "-S", guard.__file__, limit_s, launch, *sorted(others - {launch})]
    subprocess.Popen([str(word) for word in words], env={}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
