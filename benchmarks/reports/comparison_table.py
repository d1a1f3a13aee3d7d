"""The paper's table: layouts compared on one workload, in Markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from benchmarks.reports.tables import change, given, markdown_table, name_of, origin, plain_table

COLUMNS = ("layout", "TPS (tok/s)", "TPOT (ms)", "vs TP/PP", "vs DP", "MFU", "sent/rank", "comm shown", "max error")

LEGEND = (
    "TPS: tokens of one forward / its wall time, all ranks together. TPOT: B / TPS, as the paper has it. vs TP/PP: "
    "TPS against the fastest tensor/pipeline layout here. sent/rank: bytes counted in one forward. comm shown: "
    "step time less the step without communication (a pipeline's bubble counts). max error: relative error of the "
    "worst token, against the unsharded model."
)


def table(rows: list[dict[str, Any]], failed: Sequence[dict[str, Any]] = ()) -> tuple[list[str], list[list[str]]]:
    """(heads, cells). ``failed``: layouts without a row, with their reasons."""
    several_sizes = any("micro_batches" in row for row in rows) or len({row["micro_batch"] for row in rows}) > 1
    heads = ["layout", "micro-batch", *COLUMNS[1:]] if several_sizes else list(COLUMNS)
    cells = [_cells(row, several_sizes) for row in rows]
    missing = [[f["layout"], f"failed: {f['reason']}", *("" for _ in heads[2:])] for f in failed]
    return heads, cells + missing


def _cells(row: dict[str, Any], several_sizes: bool) -> list[str]:
    tried = f" of {', '.join(map(str, row['micro_batches']))}" if "micro_batches" in row else ""
    sizes = [f"{row['micro_batch']}{tried}"] if several_sizes else []
    return [
        name_of(row),
        *sizes,
        f"{row['tps']:,.0f}",
        f"{row['tpot_ms']:.4g}",
        change(row.get("vs_baseline")),
        change(row.get("vs_dp")),
        f"{100 * row['mfu']:.1f} %",
        f"{row['bytes_sent_per_rank'] / 2**20:,.1f} MiB",
        _exposed(row),
        given(row, "max_rel_error", ".1e"),
    ]


def _exposed(row: dict[str, Any]) -> str:
    exposed = row["comm_exposed_ms"]
    return "-" if exposed is None else f"{exposed:.1f} of {row['step_ms']:.1f} ms"


def caption(rows: list[dict[str, Any]]) -> str:
    r = rows[0]
    full = any(row.get("mode", "full") == "full" for row in rows)
    return (
        f"B = {r['batch']} x L = {r['length']}, {r['dtype']}, {r['gpus']} ranks of {r['device']}; one "
        f"{'full forward (prefill)' if full else 'prefill of what the next token needs'}, logits of the last token"
    )


def terminal_table(rows: list[dict[str, Any]], failed: Sequence[dict[str, Any]] = ()) -> Table:
    """Red: layouts that failed or disagree with the unsharded model."""
    heads, cells = table(rows, failed)
    wrong = [row.get("agrees") is False for row in rows] + [True for _ in failed]
    return plain_table(caption(rows), heads, cells, ["red" if w else None for w in wrong])


def markdown(document: dict[str, Any]) -> str:
    """A page: the tables, what their columns mean, and how they were made."""
    lines = [f"# {caption(document['rows'])}", "", *comparison(document)]
    return "\n".join([*lines, "", LEGEND, "", origin(document), ""])


def comparison(document: dict[str, Any]) -> list[str]:
    """Lines of Markdown: the table and, where several lengths or sizes of micro-batch were run, TPS of each."""
    rows, sweep = document["rows"], document.get("sweep", [])
    lines = markdown_table(*table(rows, document.get("failed", [])))
    if len({row["length"] for row in sweep}) > 1:
        lines += ["", "TPS by length:", "", *_tps_by("length", sweep)]
    if sizes := document.get("micro_batches"):
        own = [row for row in sizes if row["length"] == rows[0]["length"]]
        lines += ["", "TPS by size of micro-batch:", "", *_tps_by("micro_batch", own)]
    return lines


def _tps_by(field: str, rows: list[dict[str, Any]]) -> list[str]:
    values = sorted({r[field] for r in rows})
    by_layout = []
    for layout in dict.fromkeys(map(name_of, rows)):
        tps = {r[field]: r["tps"] for r in rows if name_of(r) == layout}
        by_layout.append([layout, *(f"{tps[n]:,.0f}" if n in tps else "-" for n in values)])
    return markdown_table(["layout", *map(str, values)], by_layout)
