"""The time of one sequence in every layout, against its time on one GPU.

With one sequence, replicas after the first have no work, and pipeline stages work one after the other. The time is that
to the logits of the last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.layouts.compare import Comparison
from benchmarks.layouts.run_queue import QueueResults
from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError

FIXED = ("batch_size", "micro_batch_size", "micro_batch_sizes", "dp_size", "max_length", "sweep")
"""Options that cannot be given, because measuring one sequence sets them."""
ONE_RANK: dict[str, Any] = {
    "dp_size": 1, "pp_size": 1, "ring_degree": 1, "ulysses_degree": 1, "tp_size": 1, "implementation": "ds_ring",
}  # fmt: skip


def comparison(files: Sequence[str], lengths: Sequence[int], overrides: dict[str, Any]) -> Comparison:
    """One rank alone, and then the layouts of ``files`` without data parallelism, on one sequence of each length.

    Raises:
        ConfigError: one of ``FIXED`` among the overrides, or as ``Comparison.checked``.
    """
    given = [f"--{name.replace('_', '-')}" for name in FIXED if name in overrides]
    if given:
        raise ConfigError(f"--latency decides {', '.join(given)}: it runs one sequence of each of its lengths")
    one = {"batch_size": 1, "micro_batch_size": 1, "micro_batch_sizes": ()}
    workload: dict[str, Any] = {**one, "max_length": max(lengths), "sweep": tuple(lengths)}
    loaded = [(Path(file), RunConfig.load(file, **overrides, **workload, dp_size=1)) for file in files]
    runs: dict[str, tuple[Path, RunConfig]] = {}
    for file, run in [(loaded[0][0], RunConfig.load(loaded[0][1], **ONE_RANK)), *loaded] if loaded else []:
        runs.setdefault(run.label, (file.with_stem(run.label), run))
    return Comparison.checked(list(runs.values()))


def add_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add ``vs_one_rank`` to each row: its time ÷ that of one rank alone at its length and mode; None where that does
    not fit."""
    alone = {(row["length"], row["mode"]): row["step_ms"] for row in rows if row["gpus"] == 1}
    return [
        {**row, "vs_one_rank": row["step_ms"] / one if (one := alone.get((row["length"], row["mode"]))) else None}
        for row in rows
    ]


def document(comparison: Comparison, found: QueueResults, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A comparison of single sequences as JSON.

    ``rows``: of every layout and length, with ratios; ``unfit``: what did not fit; ``unchecked``: lengths without a
    reference; ``failed``: layouts that failed otherwise.
    """
    return {
        "config": comparison.first.document(),
        "rows": rows,
        "unfit": found.unfit,
        "unchecked": found.unchecked,
        "failed": found.failures,
    }
