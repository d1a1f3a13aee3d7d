"""What the rows of a comparison say of one another and of the unsharded model, and the document they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.layouts.micro_batches import best

if TYPE_CHECKING:
    from benchmarks.layouts.compare import Comparison

TOLERANCE = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 4e-2}
"""Largest relative error against the unsharded model that counts as the same computation."""


def judge(
    rows: list[dict[str, Any]], baseline: str | None = None, unchecked: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """Add to each row, within its length and mode: ``vs_baseline`` and ``vs_dp`` (ratios of TPS), ``agrees``, which is
    None at lengths that are ``unchecked``.

    The baseline is the layout of that name, or the fastest that uses tensor or pipeline parallelism. Where each run
    timed its own peak, the highest stands for all: a noisy moment must not flatter a layout's MFU.
    """
    peak = max(row["peak_flops_per_gpu"] for row in rows)
    judged = []
    for row in rows:
        alike = [r for r in rows if (r["length"], r["mode"]) == (row["length"], row["mode"])]
        base = _tps([r for r in alike if r["layout"] == baseline or (not baseline and r["tp_size"] * r["pp_size"] > 1)])
        dp = _tps([r for r in alike if r["layout"].startswith("dp") and r["layout"] == f"dp{r['gpus']}"])
        error = row["max_rel_error"] if row["dtype"] == "fp32" else row["rel_error"]
        judged.append(
            {
                **row,
                "mfu": row["mfu"] * row["peak_flops_per_gpu"] / peak,
                "peak_flops_per_gpu": peak,
                "vs_baseline": row["tps"] / base if base else None,
                "vs_dp": row["tps"] / dp if dp else None,
                "agrees": None
                if row["length"] in unchecked
                else bool(error is not None and error < TOLERANCE[row["dtype"]]),
            }
        )
    return judged


def document(plan: Comparison, rows: list[dict[str, Any]], failed: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """``rows``: a row a layout, at the workload's own length; ``sweep``: every length; ``micro_batches``, where several
    sizes were tried: every row, of which the others are the fastest; ``failed``: ``Outcome.without_row``."""
    work = plan.first.workload
    shown = best(rows) if work.micro_batch_sizes else rows
    own = [row for row in shown if row["length"] == work.max_length]
    made = {"config": plan.first.document(), "rows": own, "sweep": shown, "failed": list(failed)}
    return made | ({"micro_batches": rows} if work.micro_batch_sizes else {})


def disagreeing(rows: list[dict[str, Any]]) -> list[str]:
    """What of ours, of judged rows, is not the unsharded model's result."""
    wrong = [row for row in ours(rows) if row["agrees"] is False]
    return list(dict.fromkeys(f"{row['layout']} at L = {row['length']}" for row in wrong))


def ours(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that are not another implementation's, whose failing is a result."""
    return [row for row in rows if row["implementation"] == "ds_ring"]


def _tps(rows: list[dict[str, Any]]) -> float | None:
    return max((r["tps"] for r in rows), default=None)
