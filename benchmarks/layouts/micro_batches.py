"""Layouts timed with several sizes of micro-batch, of which the fastest is shown."""

from __future__ import annotations

from itertools import product
from typing import Any

from ds_ring.config import RunConfig

Row = dict[str, Any]
Case = tuple[int, int, str]
"""(size of micro-batches, length, mode)."""


def cases(run: RunConfig) -> list[Case]:
    """The cases that a benchmark of ``run`` times, in its order."""
    return list(product(run.micro_batch_sizes, run.lengths, run.benchmark.modes))


def case_of(row: Row) -> Case:
    return row["micro_batch"], row["length"], row["mode"]


def missing(run: RunConfig, rows: list[Row]) -> list[Case]:
    """The ``cases`` that have no row."""
    ran = set(map(case_of, rows))
    return [case for case in cases(run) if case not in ran]


def remaining_after(run: RunConfig, unfit: Case) -> RunConfig | None:
    """What is left to try after ``unfit`` ran out of memory: larger micro-batches of shorter sequences. None: nothing.

    Smaller micro-batches have been timed by then, and longer sequences need more memory.
    """
    size, length, _ = unfit
    sizes = tuple(n for n in run.micro_batch_sizes if n > size)
    lengths = tuple(n for n in run.lengths if n < length)
    if not sizes or not lengths:
        return None
    return RunConfig.load(run, micro_batch_sizes=sizes, max_length=lengths[-1], sweep=lengths)


def best(rows: list[Row]) -> list[Row]:
    """The fastest of each group of rows that differ in their micro-batches only. ``micro_batches`` lists all sizes.

    A row that was timed twice (``counterbalance.py``) is taken before the others of its group.
    """
    alike: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        alike.setdefault((row["layout"], row["length"], row["mode"]), []).append(row)
    found = []
    for group in alike.values():
        candidates = [row for row in group if "ways_ms" in row] or group
        fastest = max(candidates, key=lambda row: float(row["tps"]))
        found.append({**fastest, "micro_batches": sorted(row["micro_batch"] for row in group)})
    return found
