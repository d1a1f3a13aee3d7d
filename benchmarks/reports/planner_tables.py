"""Predicted steps beside recorded ones (``launch/validate_planner.py``), as tables and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from benchmarks.reports.manifest import Section
from benchmarks.reports.tables import markdown_table

Rows = list[dict[str, Any]]
COLOURS = {"tp": "#8c8c8c", "pp": "#8c8c8c", "ulysses": "#55a868", "ring": "#dd8452"}
OTHERS = "#4c72b0"


def planner(documents: Sequence[dict[str, Any]], rows: Rows) -> list[str]:
    """How wrong the planner is, its constants, and every step."""
    document = documents[0]
    totals = [row for row in rows if "of" in row]
    heads = ["", "steps", "median error", "worst error", "pairs of layouts more than 4 % apart", "in the wrong order"]
    cells = [
        [
            row["of"], str(row["steps"]), f"{row['median_error']:.1%}", f"{row['worst_error']:.1%}", str(row["pairs"]),
            str(row["wrong_order"]),
        ]
        for row in totals
    ]  # fmt: skip
    lines = [f"Fitted on: {document['fitted_on']}. Held out: all other steps.", "", *markdown_table(heads, cells), ""]
    lines += [
        "The paper's workload, predicted (16 H100s, micro-batches of 4); GB: sent by a rank, in a host and between:",
        "",
    ]
    heads = ["", "layout", "tok/s", "in a host", "between", "sum"]
    paper = [
        [
            row["machine"], row["layout"], f"{row['tps']:,.0f}", f"{row['stays_gb']:,.0f} GB",
            f"{row['leaves_gb']:,.0f} GB", row["sum"],
        ]
        for row in document["paper"]
    ]  # fmt: skip
    lines += [*markdown_table(heads, paper), "", "No record has, so it is assumed:", ""]
    lines += [*(f"- {text}" for text in document["assumed"]), ""]
    constants = [[c["name"], f"{c['value']:.4g}", c["source"]] for c in document["constants"]]
    lines += ["Constants (`ds_ring/planning/rates.py`):", "", *markdown_table(["", "value", "from"], constants), ""]
    left_out = [[f"`{name}`", why] for name, why in document["left_out"].items()]
    lines += ["Left out:", "", *markdown_table(["record", "why"], left_out), ""]
    heads = ["record", "layout", "B", "micro-batch", "L", "in flight", "recorded (ms)", "predicted (ms)", "error"]
    for title, fitted_on in (("Held out", False), ("Fitted on", True)):
        steps = [_step(row) for row in rows if row.get("fitted_on") is fitted_on]
        lines += [f"{title}:", "", *markdown_table(heads, steps), ""]
    return lines[:-1]


def _step(row: dict[str, Any]) -> list[str]:
    model = "" if row["model"] == "paper" else f", {row['model']}"
    return [
        f"`{row['record']}`{model}", row["layout"], str(row["batch"]), str(row["micro_batch"]), f"{row['length']:,}",
        str(row["in_flight"]), f"{row['recorded_ms']:,.1f}", f"{row['predicted_ms']:,.1f}", f"{row['error']:+.1%}",
    ]  # fmt: skip


def draw_planner(axis: Axes, section: Section, rows: Rows) -> tuple[float, float]:
    """Predicted over recorded against what was recorded; filled: held out. Lines at 4 and at 10 %."""
    for row in (row for row in rows if "recorded_ms" in row):
        colour = next((c for axis_name, c in COLOURS.items() if axis_name in row["layout"]), OTHERS)
        face = "none" if row["fitted_on"] else colour
        axis.scatter(row["recorded_ms"], 1 + row["error"], s=22, edgecolors=colour, facecolors=face, linewidths=0.8)
    for share, style in ((0.04, ":"), (0.10, "--")):
        for ratio in (1 - share, 1 + share):
            axis.axhline(ratio, color="black", linewidth=0.6, linestyle=style)
    named = {
        "data parallel, one GPU": OTHERS,
        "ring": COLOURS["ring"],
        "Ulysses": COLOURS["ulysses"],
        "TP, PP": COLOURS["tp"],
    }
    for name, colour in named.items():
        axis.scatter([], [], s=22, color=colour, label=name)
    axis.scatter([], [], s=22, edgecolors="black", facecolors="none", label="fitted on")
    axis.set_xscale("log")
    axis.set_ylim(0.87, 1.13)
    axis.set_xlabel("recorded step (ms)")
    axis.set_ylabel("predicted / recorded")
    axis.legend(fontsize=7, frameon=False, ncols=5, loc="upper center")
    return 9, 4.5
