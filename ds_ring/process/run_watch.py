"""What the command that launched a run sees of it from outside: processes that are stopped, a launcher that hangs."""

from __future__ import annotations

import time

from ds_ring.process.outcome import Outcomes
from ds_ring.process.pauses import Pauses
from ds_ring.process.processes import stopped_processes

LEAVING_S, STOPPED_LEAVING_S = 30.0, 5.0
"""A launcher that has not ended so many seconds after the result is there is ended; the second: where one of its
processes is stopped."""


class RunWatch:
    """Watches a run, whose processes are those of one session.

    Attributes:
        session: number of the session, which is the launcher's process.
        timeout_s: how long a process of the run may be stopped; 0: for ever.
    """

    def __init__(self, session: int, outcomes: Outcomes, timeout_s: float) -> None:
        self.session, self.timeout_s = session, timeout_s
        self._outcomes = outcomes
        self._done_at: float | None = None
        self._stopped_at: dict[int, float] = {}
        self._pauses = Pauses()

    def reason_to_end(self) -> str:
        """Why the run is to be ended now; empty where it may go on. To be asked every second or so."""
        now = time.monotonic()
        if self._pauses.look():  # and it may be continued before what it started
            self._stopped_at, self._done_at = {}, None
        if self._done_at is None and self._outcomes.completed():
            self._done_at = now
        self._stopped_at = {pid: self._stopped_at.get(pid, now) for pid in stopped_processes(self.session)}
        if self._done_at is not None:
            limit_s = STOPPED_LEAVING_S if self._stopped_at else LEAVING_S
            return (
                f"the launcher did not end in {limit_s:.0f} s after the result" if now - self._done_at > limit_s else ""
            )
        late = [pid for pid, since in self._stopped_at.items() if self.timeout_s and now - since > self.timeout_s]
        return f"process {late[0]} of the run was stopped for {self.timeout_s:.0f} s" if late else ""
