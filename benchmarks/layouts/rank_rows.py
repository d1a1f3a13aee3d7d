"""Rows of a comparison against each other and against the unsharded model, and the document of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.layouts.micro_batches import best

if TYPE_CHECKING:
    from benchmarks.layouts.compare import Comparison

TOLERANCE = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 4e-2}
"""Largest relative error against the unsharded model that counts as the same computation."""


def add_ratios(
    rows: list[dict[str, Any]], baseline: str | None = None, unchecked: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """Add to each row ``vs_baseline`` and ``vs_dp``, ratios of TPS at its length and mode, and ``agrees``.

    ``agrees`` is None at lengths that are ``unchecked``. The highest peak of all rows becomes the peak of each: where
    each launch timed its own, a slow moment would raise the MFU of a layout.

    Args:
        baseline: name of a layout. None: the fastest that uses tensor or pipeline parallelism.
    """
    peak = max(row["peak_flops_per_gpu"] for row in rows)
    found = []
    for row in rows:
        alike = [r for r in rows if (r["length"], r["mode"]) == (row["length"], row["mode"])]
        base = _tps([r for r in alike if r["layout"] == baseline or (not baseline and r["tp_size"] * r["pp_size"] > 1)])
        dp = _tps([r for r in alike if r["layout"].startswith("dp") and r["layout"] == f"dp{r['gpus']}"])
        error = row["max_rel_error"] if row["dtype"] == "fp32" else row["rel_error"]
        checked = row["length"] not in unchecked
        found.append(
            {
                **row,
                "mfu": row["mfu"] * row["peak_flops_per_gpu"] / peak,
                "peak_flops_per_gpu": peak,
                "vs_baseline": row["tps"] / base if base else None,
                "vs_dp": row["tps"] / dp if dp else None,
                "agrees": bool(error is not None and error < TOLERANCE[row["dtype"]]) if checked else None,
            }
        )
    return found


def document(
    comparison: Comparison, rows: list[dict[str, Any]], failed: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """A comparison as JSON.

    ``rows``: one of each layout, at the workload's own length; ``sweep``: of every length; ``micro_batches``, where
    several sizes were timed: of every size, of which the others are the fastest; ``failed``:
    ``QueueResults.all_failures``.
    """
    work, how = comparison.first.workload, comparison.first.benchmark
    shown = best(rows) if how.micro_batch_sizes else rows
    own = [row for row in shown if row["length"] == work.max_length]
    made = {"config": comparison.first.document(), "rows": own, "sweep": shown, "failed": list(failed)}
    return made | ({"micro_batches": rows} if how.micro_batch_sizes else {})


def disagreeing(rows: list[dict[str, Any]]) -> list[str]:
    """Layouts of ours, with their lengths, whose result is not the unsharded model's."""
    wrong = [row for row in ours(rows) if row["agrees"] is False]
    return list(dict.fromkeys(f"{row['layout']} at L = {row['length']}" for row in wrong))


def ours(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that are no baseline's. That a baseline fails is a result, not an error."""
    return [row for row in rows if row["implementation"] == "ds_ring"]


def _tps(rows: list[dict[str, Any]]) -> float | None:
    return max((r["tps"] for r in rows), default=None)
