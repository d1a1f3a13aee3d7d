"""A rank that waits for another one in vain says so and ends, instead of waiting for ever.

When a rank is stopped, or hangs in a driver, the ranks that wait for it hang too. Some wait in a process group, whose
own time-out may be half an hour. Others wait for a flag on a CUDA stream, which has no time-out.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from typing import Any, Protocol, TypeVar, cast

from ds_ring.process import heartbeat
from ds_ring.process.pauses import Pauses
from ds_ring.process.processes import siblings
from ds_ring.utils.streams import last_words

PERIOD_S = 1.0
VERDICT_S = 3 * heartbeat.PERIOD_S
"""A rank of another host that is silent is named by the heartbeat, which comes to that about now."""

Method = TypeVar("Method", bound=Callable[..., Any])


class Activity(Protocol):
    """The communication that a rank has begun.

    Attributes:
        count: number of operations.
        last: name of the latest one.
        moved_at: when it began, by ``time.monotonic``.
    """

    count: int
    last: str
    moved_at: float


@dataclass
class NoActivity:
    """The activity of a rank that is not connected yet."""

    count: int = 0
    last: str = ""
    moved_at: float = 0.0


class Watchdog:
    """Ends the process when a watched call lasts ``timeout_s`` seconds in which this rank begins no communication.

    Watches launched ranks only: no other process waits for ranks of other processes.

    Attributes:
        timeout_s: 0: never.
    """

    def __init__(self, activity: Activity, timeout_s: float) -> None:
        self.activity, self.timeout_s = activity, timeout_s
        self._calls: list[str] = []
        self._since = 0.0
        self._thread: threading.Thread | None = None
        self._pauses = Pauses()

    @contextmanager
    def watch(self, call: str) -> Iterator[None]:
        """Watch the block. ``call`` names it in the message. Blocks may be nested."""
        launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if launched and self.timeout_s and self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="watchdog")
            self._thread.start()
        self._since = time.monotonic()
        self._calls.append(call)
        try:
            yield
        finally:
            self._calls.pop()
            self._since = time.monotonic()

    def stalled_s(self) -> float:
        """Seconds since communication last began in the watched call, or since this process was last continued; 0 where
        no call is watched."""
        begun = max(self._since, self.activity.moved_at, self._pauses.over_at)
        return time.monotonic() - begun if self._calls else 0.0

    def describe(self) -> str:
        call = self._calls[-1] if self._calls else "nothing"
        last = (
            f"the last is {self.activity.last}, number {self.activity.count}" if self.activity.count else "none began"
        )
        return f"no communication began for {self.stalled_s():.0f} s in {call} ({last})"

    def _run(self) -> None:
        self._pauses.look()
        while not self.timeout_s or self.stalled_s() <= self.timeout_s:
            time.sleep(min(PERIOD_S, self.timeout_s or PERIOD_S))
            self._pauses.look()
        stopped = [sibling for sibling in siblings() if sibling.stopped]
        if not stopped and heartbeat.running():
            time.sleep(VERDICT_S)
        who = ", ".join(f"rank {sibling.rank}" for sibling in stopped)
        why = f"{who} of this host is stopped" if who else "another rank hangs: look for one whose last number is lower"
        last_words(f"failed on rank {os.environ.get('RANK', '0')}: {self.describe()}; {why}")
        for sibling in stopped:  # a stopped process reacts to no other signal, and its launcher waits for it
            with suppress(ProcessLookupError, PermissionError):
                os.kill(sibling.pid, signal.SIGKILL)
        os._exit(1)


process_watchdog = Watchdog(NoActivity(), 0)
"""Watches what a rank does outside its engines: connecting, waiting for others to load, leaving. ``connect`` sets
its time-out and its activity."""


def watched(method: Method) -> Method:
    """Decorator: calls of the method are watched by its object's ``watchdog``."""

    @wraps(method)
    def call(owner: Any, *args: Any, **options: Any) -> Any:
        with owner.watchdog.watch(method.__name__):
            return method(owner, *args, **options)

    return cast(Method, call)
