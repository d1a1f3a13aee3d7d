"""How long one sequence takes in every layout, against one GPU's time for it.

One row, so nothing runs beside it: replicas beyond the first have no work and pipeline stages take turns. What counts
is the time to the logits that follow the sequence, and where the sequence does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.layouts.compare import Comparison
from benchmarks.layouts.run_queue import Findings
from benchmarks.reports.tables import markdown_table, name_of, origin, plain_table
from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError

FIXED = ("batch_size", "micro_batch_size", "micro_batch_sizes", "dp_size", "max_length", "sweep")
"""Options that measuring one sequence decides."""
ONE_RANK: dict[str, Any] = {
    "dp_size": 1, "pp_size": 1, "ring_degree": 1, "ulysses_degree": 1, "tp_size": 1, "implementation": "ds_ring",
}  # fmt: skip


def plan(files: Sequence[str], lengths: Sequence[int], overrides: dict[str, Any]) -> Comparison:
    """``files``' layouts without their data parallelism on one sequence of each length, and one rank alone, first.

    Raises:
        ConfigError: an option that is not free here, or as ``Plan.checked``.
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


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add ``vs_one_rank`` to each row: its time over that of one rank alone, at its length and in its mode; None where
    that does not fit."""
    alone = {(row["length"], row["mode"]): row["step_ms"] for row in rows if row["gpus"] == 1}
    return [
        {**row, "vs_one_rank": row["step_ms"] / one if (one := alone.get((row["length"], row["mode"]))) else None}
        for row in rows
    ]


def document(plan: Comparison, found: Findings, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """``rows``: judged ones of every layout and length; ``unfit``: what did not fit; ``unchecked``: lengths at which
    there was nothing to hold results against; ``failed``: layouts that ended otherwise."""
    return {
        "config": plan.first.document(),
        "rows": rows,
        "unfit": found.unfit,
        "unchecked": found.unchecked,
        "failed": found.failures,
    }


def table(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(heads, cells): seconds of every layout and length and, in brackets, over one rank's."""
    rows, unfit = document["rows"], document["unfit"]
    lengths = sorted({row["length"] for row in [*rows, *unfit]})
    seconds = {(name_of(row), row["length"]): _cell(row) for row in rows}
    seconds |= {(name_of(row), row["length"]): "does not fit" for row in unfit}
    failed = {what["layout"]: f"failed: {what['reason']}" for what in document.get("failed", [])}
    names = dict.fromkeys([*(name_of(row) for row in [*rows, *unfit]), *failed])
    heads = ["layout", *(f"L = {length:,}" for length in lengths)]
    return heads, [
        [name, *(seconds.get((name, length), failed.get(name, "-")) for length in lengths)] for name in names
    ]


def caption(document: dict[str, Any]) -> str:
    row = document["rows"][0]
    return f"Seconds to the logits behind one sequence, {row['dtype']}, {row['device']}; in brackets: over one rank's"


def markdown(document: dict[str, Any]) -> str:
    lines = [f"# {caption(document)}", "", *markdown_table(*table(document)), "", origin(document), ""]
    return "\n".join(lines)


def terminal_table(document: dict[str, Any]) -> Table:
    return plain_table(caption(document), *table(document))


def _cell(row: dict[str, Any]) -> str:
    seconds, ratio = f"{row['step_ms'] / 1e3:.3f}", row["vs_one_rank"]
    return seconds if ratio is None or row["gpus"] == 1 else f"{seconds} ({ratio:.2f})"
