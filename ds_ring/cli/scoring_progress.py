"""How far a scoring job is, in lines."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

SAY_EVERY_S = 5.0
"""Least time between two lines."""


class ScoringProgress:
    """Counts tokens, and from them how long the rest takes. ``say`` is given a line; ``clock`` gives seconds."""

    def __init__(
        self, documents: int, tokens: int, say: Callable[[str], None], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._documents, self._tokens, self._say, self._clock = documents, tokens, say, clock
        self._done_documents = self._done_tokens = 0
        self._began = self._said = clock()

    def advance(self, documents: int, tokens: int) -> None:
        """So many more are scored."""
        self._done_documents += documents
        self._done_tokens += tokens
        now = self._clock()
        last = self._done_tokens == self._tokens
        if now - self._said < SAY_EVERY_S and not last:
            return
        self._said = now
        rate = self._done_tokens / max(now - self._began, 1e-9)
        took = timedelta(seconds=round(now - self._began))
        left = timedelta(seconds=round((self._tokens - self._done_tokens) / rate)) if rate else None
        self._say(
            f"scored {self._done_tokens:,} of {self._tokens:,} tokens, {self._done_documents:,} of "
            f"{self._documents:,} documents, {rate:,.0f} tok/s, " + (f"in {took}" if last else f"{left} left")
        )
