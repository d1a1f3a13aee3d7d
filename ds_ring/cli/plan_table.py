"""The planner's layouts as a table for the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ds_ring.utils.numbers import milliseconds, rate, sent, size


def plan_table(rows: list[dict[str, Any]]) -> Table:
    """Layouts and their predicted figures: rows of ``explain.row``, fastest first. Red: the layout does not fit."""
    table = Table(
        title="Predicted, best first; red: does not fit; a rank sends in hosts and between", title_justify="left"
    )
    for name in ("layout", "in flight", "TPS", "step", "comm and bubble", "in hosts", "between", "memory"):
        table.add_column(name, justify="left" if name == "layout" else "right")
    for row in rows:
        table.add_row(
            row["layout"], str(row["in_flight"]), rate(row["tps"]), milliseconds(row["step_ms"] / 1e3),
            milliseconds(row["exposed_ms"] / 1e3), sent(1e9 * row["stays_gb"]), sent(1e9 * row["leaves_gb"]),
            size(2**30 * row["memory_gib"]), style=None if row["fits"] else "red",
        )  # fmt: skip
    return table
