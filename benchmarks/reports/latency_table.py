"""The times of one sequence (``benchmarks/layouts/latency.py``) as a table."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from benchmarks.reports.tables import markdown_table, name_of, origin, plain_table


def table(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(heads, cells): seconds of every layout and length and, in brackets, ÷ one rank's."""
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
    return f"Seconds to the logits after one sequence, {row['dtype']}, {row['device']}; in brackets: over one rank's"


def markdown(document: dict[str, Any]) -> str:
    lines = [f"# {caption(document)}", "", *markdown_table(*table(document)), "", origin(document), ""]
    return "\n".join(lines)


def terminal_table(document: dict[str, Any]) -> Table:
    return plain_table(caption(document), *table(document))


def _cell(row: dict[str, Any]) -> str:
    seconds, ratio = f"{row['step_ms'] / 1e3:.3f}", row["vs_one_rank"]
    return seconds if ratio is None or row["gpus"] == 1 else f"{seconds} ({ratio:.2f})"
