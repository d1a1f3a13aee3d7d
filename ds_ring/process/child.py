"""Commands that this process starts, and how they end: with all that they started, whatever ends this process.

A child is the first of a session of its own, so all that it starts can be ended together; a keeper does so after this
process (``process/keeper.py``). An interruption of this process leaves the block, and so ends the child.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO

from ds_ring.process.interruption import deferred
from ds_ring.process.keeper import Keeper, kill_all, tree_of

PERIOD_S, ASK_EVERY_S = 0.2, 1.0
GRACE_S = 10.0
"""Seconds between asking processes to end and killing them."""


class Child:
    """A started command. ``process`` is its first process, whose number is that of its session and group."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def wait(
        self, reason_to_end: Callable[[], str], look: Callable[[], None] = lambda: None, limit_s: float = math.inf
    ) -> str:
        """Wait until the child has ended itself, and return nothing; or for a reason to end it, and return that.

        Args:
            reason_to_end: is asked every second; the empty string is none.
            look: is called several times a second.
            limit_s: more seconds than these are a reason.
        """
        begun = asked_at = time.monotonic()
        while True:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(PERIOD_S)
                return ""
            look()
            now = time.monotonic()
            if now - begun > limit_s:
                return f"it took longer than {limit_s:.0f} s"
            if now - asked_at > ASK_EVERY_S:
                asked_at = now
                if reason := reason_to_end():
                    return reason

    def end(self) -> None:
        """End the child and all that it started; where it still runs, after ``GRACE_S`` seconds in which it may."""
        started = tree_of(self.process.pid)  # while it is there: what it leaves has other parents
        if self.process.returncode is None:
            self.send(signal.SIGTERM, signal.SIGCONT)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_S)
        self.send(signal.SIGKILL)
        kill_all([pid for pid in started if pid != self.process.pid])
        self.process.wait()

    def send(self, *numbers: int) -> None:
        """Send signals to the child's group."""
        for number in numbers:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)


@contextmanager
def started(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    stdin: int | None = None,
    stdout: int | IO[bytes],
    stderr: int | None = None,
    folder: Path | None = None,
) -> Iterator[Child]:
    """``command`` as a child, which has ended at the end of the block."""
    with Keeper() as keeper, ExitStack() as stack:
        with deferred():  # an interruption before the block that ends the child would leave it running
            process = subprocess.Popen(
                command, env=environment, cwd=folder, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True
            )
            child = Child(process)
            stack.enter_context(keeper.group(process.pid))
            stack.callback(child.end)
            stack.enter_context(_stopped_with_this(child))
        yield child


@contextmanager
def _stopped_with_this(child: Child) -> Iterator[None]:
    """A user who stops this process at a terminal stops the child as well, and continues both."""

    def stop(number: int, frame: FrameType | None) -> None:
        child.send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)  # and here this process goes on when it is continued
        child.send(signal.SIGCONT)

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTSTP) is signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGTSTP, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, before)
