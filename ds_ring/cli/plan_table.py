"""The planner's layouts as a table for the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table


def plan_table(rows: list[dict[str, Any]]) -> Table:
    """Layouts and their predicted figures: rows of ``explain.row``, fastest first. Red: the layout does not fit."""
    table = Table(title="Predicted, best first; red: does not fit; GB: sent by a rank", title_justify="left")
    for name in ("layout", "in flight", "TPS (tok/s)", "step", "comm and bubble", "in hosts", "between", "memory"):
        table.add_column(name, justify="left" if name == "layout" else "right")
    for row in rows:
        table.add_row(
            row["layout"], str(row["in_flight"]), f"{row['tps']:,.0f}", f"{row['step_ms']:,.1f} ms",
            f"{row['exposed_ms']:,.1f} ms", f"{row['stays_gb']:,.1f} GB", f"{row['leaves_gb']:,.1f} GB",
            f"{row['memory_gib']:.1f} GiB", style=None if row["fits"] else "red",
        )  # fmt: skip
    return table
