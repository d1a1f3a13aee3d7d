"""Which slots of a spread cache hold a token in every row: behind them a query sees all, and nothing is compared."""

from __future__ import annotations

Runs = tuple[slice, ...]


class CommonSlots:
    """Of every rank, in runs. It follows from lengths alone, so that each rank knows it of all.

    Slots that stay empty because a chunk does not divide among the ranks are gaps between runs. Rows that hold
    unequally many tokens, or lose some later, have nothing in common from then on: what they see goes by positions.
    """

    def __init__(self, size: int) -> None:
        self._runs: list[list[slice]] | None = [[] for _ in range(size)]

    def add(self, rank: int, start: int, count: int) -> None:
        """``rank`` has a token of every row in ``count`` slots from ``start`` on, which follow those it had."""
        if self._runs is None or not count:
            return
        runs = self._runs[rank]
        first = runs.pop().start if runs and runs[-1].stop == start else start
        runs.append(slice(first, start + count))

    def end(self) -> None:
        """Rows are no longer alike."""
        self._runs = None

    def of(self, rank: int) -> Runs:
        return () if self._runs is None else tuple(self._runs[rank])
