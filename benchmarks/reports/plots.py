"""Pictures of comparisons: throughput, and the time of one sequence."""

from __future__ import annotations

import io
from pathlib import Path
from textwrap import wrap
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from benchmarks.reports.comparison_table import caption
from benchmarks.reports.tables import name_of
from ds_ring.utils.output_file import write_atomically

KIND_COLOURS = {
    "tensor/pipeline parallel": "#8c8c8c", "data parallel": "#4c72b0", "sequence parallel": "#dd8452",
    "baseline": "#55a868",
}  # fmt: skip


def kind(row: dict[str, Any]) -> str:
    """One of ``KIND_COLOURS``. A baseline is another project's implementation."""
    if row.get("implementation", "ds_ring") != "ds_ring":
        return "baseline"
    if row["tp_size"] * row["pp_size"] > 1:
        return "tensor/pipeline parallel"
    return "sequence parallel" if row["ring_degree"] * row["ulysses_degree"] > 1 else "data parallel"


def draw(document: dict[str, Any], path: Path) -> None:
    """A bar for each layout and, where several lengths were run, TPS against length beside them."""
    rows, sweep = document["rows"], document.get("sweep", [])
    lengths = sorted({r["length"] for r in sweep})
    panels = 2 if len(lengths) > 1 else 1
    figure, axes = plt.subplots(1, panels, figsize=(1 + 5.5 * panels, 4.5), squeeze=False, layout="constrained")
    bars = axes[0][0]
    for i, row in enumerate(rows):
        bar = bars.bar(i, row["tps"], color=KIND_COLOURS[kind(row)], label=kind(row))
        bars.bar_label(bar, [f"{row['tps']:,.0f}"], padding=2, fontsize=9)
    bars.set_xticks(range(len(rows)), [name_of(r).replace("_", "\n").replace(" ", "\n") for r in rows])
    bars.set_ylabel("tokens / s, all ranks")
    bars.set_title(f"L = {rows[0]['length']}")
    handles = dict(zip(*reversed(bars.get_legend_handles_labels()), strict=True))
    bars.set_ylim(0, 1.2 * max(r["tps"] for r in rows))
    bars.legend(handles.values(), handles.keys(), loc="upper left", ncols=3, fontsize=8, frameon=False)
    if len(lengths) > 1:
        lines = axes[0][1]
        for layout in dict.fromkeys(map(name_of, sweep)):
            mine = sorted((r for r in sweep if name_of(r) == layout), key=lambda r: r["length"])
            style = "--" if kind(mine[0]) == "tensor/pipeline parallel" else "-"
            lines.plot([r["length"] for r in mine], [r["tps"] for r in mine], style, marker="o", label=layout)
        lines.set_xscale("log", base=2)
        lines.set_xticks(lengths, [f"{n:,}" for n in lengths])
        lines.set_ylim(0, 1.05 * lines.get_ylim()[1])
        lines.set_xlabel("sequence length L (tokens)")
        lines.set_ylabel("tokens / s, all ranks")
        lines.set_title("TPS against length")
        lines.legend(fontsize=8, frameon=False)
    for axis in axes[0]:
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("\n".join(wrap(caption(rows), 85 * panels)), fontsize=9)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write the picture, completely or not at all, and free it."""
    made = io.BytesIO()
    figure.savefig(made, format="png", dpi=130)
    plt.close(figure)
    write_atomically(path, made.getvalue())


def draw_latency(document: dict[str, Any], path: Path) -> None:
    """Seconds of one sequence against its length, a line for each layout. Both axes are logarithmic."""
    rows = document["rows"]
    figure, axis = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    for layout in dict.fromkeys(map(name_of, rows)):
        mine = sorted((r for r in rows if name_of(r) == layout), key=lambda r: r["length"])
        style = "--" if kind(mine[0]) == "tensor/pipeline parallel" else "-"
        axis.plot([r["length"] for r in mine], [r["step_ms"] / 1e3 for r in mine], style, marker="o", label=layout)
    lengths = sorted({r["length"] for r in rows})
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axis.set_xlabel("sequence length L (tokens), B = 1")
    axis.set_ylabel("seconds")
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{rows[0]['dtype']}, {rows[0]['device']}", fontsize=9)
    save(figure, path)
