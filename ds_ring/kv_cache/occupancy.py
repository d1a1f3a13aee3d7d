"""Which slots of a spread cache hold a token: behind those of its row a query sees all, and nothing is compared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

SlotRanges = tuple[slice, ...]


class Occupancy:
    """Of every row and rank, in runs. It follows from lengths alone, so that each rank knows it of all.

    Slots that stay empty, because a row is shorter than others or a chunk does not divide among the ranks, are gaps
    between runs. A row that loses tokens later has none that are known: what it sees goes by positions.
    """

    def __init__(self, sequences: int, size: int) -> None:
        self._slot_ranges: list[list[list[slice]] | None] = [[[] for _ in range(size)] for _ in range(sequences)]

    def add(self, sequence: int, rank: int, start: int, count: int) -> None:
        """``rank`` has a token of ``row`` in ``count`` slots from ``start`` on, which follow those it had."""
        by_rank = self._slot_ranges[sequence]
        if by_rank is not None and count:
            slot_ranges = by_rank[rank]
            first = slot_ranges.pop().start if slot_ranges and slot_ranges[-1].stop == start else start
            slot_ranges.append(slice(first, start + count))

    def add_to_all(self, rank: int, slot: int) -> None:
        """``rank`` has a token of every row in ``slot``."""
        for sequence in range(len(self._slot_ranges)):
            self.add(sequence, rank, slot, 1)

    def lose(self, sequences: Iterable[int]) -> None:
        """Some tokens of these rows are hidden."""
        for sequence in sequences:
            self._slot_ranges[sequence] = None

    def of(self, sequences: slice, rank: int) -> SlotRanges:
        """The slots that each of ``rows`` has a token in, up to the first that some have one in and others not."""
        known = self._slot_ranges[sequences]
        by_row = [by_rank[rank] for by_rank in known if by_rank is not None]
        if not by_row or len(by_row) < len(known):
            return ()
        common: Sequence[slice] = by_row[0]
        for slot_ranges in by_row[1:]:
            common = _while_alike(common, slot_ranges)
        return tuple(common)


def _while_alike(one: Sequence[slice], other: Sequence[slice]) -> list[slice]:
    found = list[slice]()
    for a, b in zip(one, other, strict=False):
        if a.start == b.start:
            found.append(slice(a.start, min(a.stop, b.stop)))
        if a != b:
            break
    return found
