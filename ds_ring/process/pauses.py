"""Whether this process was itself held up: a user stops a whole launch, and continues it later. What it waits for was
held up as well, and that time does not count."""

from __future__ import annotations

import math
import time

PAUSE_S = 5.0
"""Who looks every second or so, and has not for this long, was held up."""


class Pauses:
    """Attributes:
    over_at: the end of the last pause, by ``time.monotonic``; -inf: there was none.
    """

    def __init__(self) -> None:
        self.over_at = -math.inf
        self._looked_at = time.monotonic()

    def look(self) -> bool:
        """Whether this process was held up since the last call."""
        now = time.monotonic()
        held_up, self._looked_at = now - self._looked_at > PAUSE_S, now
        if held_up:
            self.over_at = now
        return held_up
