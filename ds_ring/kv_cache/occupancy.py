"""Which slots of every rank hold a token of each sequence.

A query that comes after all of a sequence's cached tokens sees every such slot, so that no positions are compared.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

SlotRanges = tuple[slice, ...]


class Occupancy:
    """Filled slots of every sequence and rank, as ranges. They follow from lengths alone: each rank knows those of all.

    Slots that stay empty, because a sequence is shorter than others or a chunk does not divide among the ranks, are
    gaps between ranges. A sequence that loses tokens later has no known ranges: its queries go by positions.
    """

    def __init__(self, sequences: int, size: int) -> None:
        self._slot_ranges: list[list[list[slice]] | None] = [[[] for _ in range(size)] for _ in range(sequences)]

    def add(self, sequence: int, rank: int, start: int, count: int) -> None:
        """``rank`` has tokens of ``sequence`` in ``count`` slots from ``start`` on, after those it had."""
        by_rank = self._slot_ranges[sequence]
        if by_rank is not None and count:
            slot_ranges = by_rank[rank]
            first = slot_ranges.pop().start if slot_ranges and slot_ranges[-1].stop == start else start
            slot_ranges.append(slice(first, start + count))

    def add_to_all(self, rank: int, slot: int) -> None:
        """``rank`` has a token of every sequence in ``slot``."""
        for sequence in range(len(self._slot_ranges)):
            self.add(sequence, rank, slot, 1)

    def lose(self, sequences: Iterable[int]) -> None:
        """Some tokens of these sequences were hidden."""
        for sequence in sequences:
            self._slot_ranges[sequence] = None

    def selected(self, sequences: Iterable[int]) -> Occupancy:
        """Of these sequences, in this order."""
        found = copy.copy(self)
        found._slot_ranges = [copy.deepcopy(self._slot_ranges[sequence]) for sequence in sequences]
        return found

    def crop(self, used: Sequence[int]) -> None:
        """Every rank has but the first ``used`` of its slots."""
        for by_rank in self._slot_ranges:
            for rank, slot_ranges in enumerate(by_rank or ()):
                kept = [slice(r.start, min(r.stop, used[rank])) for r in slot_ranges if r.start < used[rank]]
                slot_ranges[:] = kept

    def of(self, sequences: slice, rank: int) -> SlotRanges:
        """The slots in which each of ``sequences`` has a token, up to the first in which only some of them have one."""
        known = self._slot_ranges[sequences]
        by_sequence = [by_rank[rank] for by_rank in known if by_rank is not None]
        if not by_sequence or len(by_sequence) < len(known):
            return ()
        common: Sequence[slice] = by_sequence[0]
        for slot_ranges in by_sequence[1:]:
            common = _common_start(common, slot_ranges)
        return tuple(common)


def _common_start(one: Sequence[slice], other: Sequence[slice]) -> list[slice]:
    found = list[slice]()
    for a, b in zip(one, other, strict=False):
        if a.start == b.start:
            found.append(slice(a.start, min(a.stop, b.stop)))
        if a != b:
            break
    return found
