"""What the performance page opens with: a few tables that fit a screen, each row from one record.

A record that does not exist has no row, and the summary names it.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.reports.manifest import Summary, SummaryKind, SummaryRecord, SummaryTable
from benchmarks.reports.record_tables import Document, Rows
from benchmarks.reports.tables import given, markdown_table
from ds_ring.utils.results import read_json

AXES = {"dp_size": "DP", "ring_degree": "ring", "ulysses_degree": "Ulysses", "tp_size": "TP", "pp_size": "PP"}
"""The families of layouts that the summary shows, by the only degree above 1. Layouts of several are in the details."""
SHARED = tuple(AXES.values())[1:]
"""Those that share one sequence."""
BASELINES = {
    "deepspeed_ulysses": "DeepSpeed's Ulysses", "context_parallel": "PyTorch's context_parallel",
    "yunchang_ring": "yunchang's ring", "yunchang_ulysses": "yunchang's Ulysses",
}  # fmt: skip
"""Other implementations, by the names of their layouts without the number of ranks."""
WIDTH = 120


def lines(summary: Summary, folder: Path) -> list[str]:
    """The summary in Markdown, from the records in ``folder``."""
    text: list[str] = []
    missing: list[str] = []
    for table in summary.tables:
        heads, cell_maker = TABLES[table.kind]
        rows: list[list[str]] = []
        for record in table.records:
            if (file := folder / record.file).is_file():
                rows += [[*cells, f"`{record.file}`"] for cells in cell_maker(table, record, read_json(file))]
            else:
                missing.append(f"`{record.file}`")
        text += [f"**{table.title}** {table.caption}", "", *markdown_table([*heads, "record"], rows), ""]
    if missing:
        text += [f"Not recorded yet: {', '.join(missing)}.", ""]
    return [*text, *textwrap.wrap(summary.note, WIDTH), ""]


def family(row: dict[str, Any]) -> str | None:
    """The row's family, or that it is of one rank; None for layouts of several axes and other implementations."""
    used = [name for axis, name in AXES.items() if row[axis] > 1]
    if row["implementation"] != "ds_ring" or row["mode"] != "full" or len(used) > 1:
        return None
    return used[0] if used else "one GPU"


def _throughput(table: SummaryTable, record: SummaryRecord, document: Document) -> Iterable[list[str]]:
    rows = _by_family(document["rows"], table.length)
    for name in (name for name in AXES.values() if name in rows):
        row = rows[name]
        ratios = (given(row, ratio, ".3f") for ratio in ("vs_dp", "vs_baseline"))
        yield [name, _gpus(row), f"{row['tps_per_gpu']:,.0f}", *ratios]


def _one_sequence(table: SummaryTable, record: SummaryRecord, document: Document) -> Iterable[list[str]]:
    rows = _by_family(document["rows"], table.length)
    alone = rows.get("one GPU")
    shared = [rows[name] for name in SHARED if name in rows]
    if shared:
        cells = [_seconds(rows.get(name)) for name in SHARED]
        yield [_gpus(shared[0]), "-" if alone is None else f"{alone['step_ms'] / 1e3:.3f}", *cells]


def _implementations(table: SummaryTable, record: SummaryRecord, document: Document) -> Iterable[list[str]]:
    rows = document["rows"]
    ours = _by_family(rows, None)
    others = {re.sub(r"\d+$", "", row["layout"]): row["tps_per_gpu"] for row in rows if family(row) is None}
    ring, best = ours.get("ring"), max(others.values(), default=None)
    yield [
        record.name, _gpus(rows[0]),
        *(f"{ours[name]['tps_per_gpu']:,.0f}" if name in ours else "-" for name in ("DP", "ring")),
        *(f"{others[name]:,.0f}" if name in others else "-" for name in BASELINES),
        f"{ring['tps_per_gpu'] / best:.2f}" if ring and best else "-",
    ]  # fmt: skip


def _by_family(rows: Rows, length: int | None) -> dict[str, dict[str, Any]]:
    """Of each family the row of this length; None: of any."""
    return {name: row for row in rows if length in (None, row["length"]) and (name := family(row)) is not None}


def _gpus(row: dict[str, Any]) -> str:
    """``2 x H100`` for two of NVIDIA's "H100 80GB HBM3"."""
    return f"{row['gpus']} x {row['device'].removeprefix('NVIDIA ').partition(' ')[0]}"


def _seconds(row: dict[str, Any] | None) -> str:
    return "-" if row is None else f"{row['step_ms'] / 1e3:.3f} ({given(row, 'vs_one_rank', '.3f')})"


Cells = Callable[[SummaryTable, SummaryRecord, Document], Iterable[list[str]]]
"""(table, record, its document) -> cells of the record's rows, without the record's name"""
TABLES: dict[SummaryKind, tuple[list[str], Cells]] = {
    "throughput": (["layout", "GPUs", "tok/s a GPU", "÷ DP", "÷ best of TP, PP"], _throughput),
    "one_sequence": (["GPUs", "one GPU (s)", *(f"{name} (s)" for name in SHARED)], _one_sequence),
    "implementations": (
        ["model", "GPUs", "our DP", "our ring", *BASELINES.values(), "ring ÷ best other"],
        _implementations,
    ),
}  # fmt: skip
