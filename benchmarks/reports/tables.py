"""Tables in Markdown and for the terminal, and the texts of their cells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

from rich.table import Table

from ds_ring.utils.plain_text import one_line


def name_of(row: dict[str, Any]) -> str:
    """The layout, and the mode where it is not a full forward."""
    full = row.get("mode", "full") == "full"
    return str(row["layout"]) if full else f"{row['layout']} ({row['mode'].replace('_', ' ')})"


def given(row: dict[str, Any], name: str, style: str) -> str:
    """A figure, or a dash where the row has none."""
    return "-" if row.get(name) is None else format(row[name], style)


def change(ratio: float | None) -> str:
    """A ratio as a change in percent, or a dash."""
    return "-" if ratio is None else f"{100 * (ratio - 1):+.1f} %"


def clock_and_power(row: dict[str, Any]) -> list[str]:
    return [given(row, name, ".0f") for name in ("sm_clock_mhz", "power_w")]


def origin(document: dict[str, Any]) -> str:
    """The command that made a results file, the commit it ran at, when, and with which versions."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return f"`{document['command']}` at {document['git']}, {document['date']}; {versions}"


def without_empty_columns(heads: list[str], cells: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    kept = [i for i in range(len(heads)) if any(row[i] not in ("", "-") for row in cells)]
    return [heads[i] for i in kept], [[row[i] for i in kept] for row in cells]


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table. All columns but the first are aligned right."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return ["| " + " | ".join(map(_in_a_cell, cells)) + " |" for cells in lines]


def _in_a_cell(text: str) -> str:
    """``text`` on one line and without a bar that would end the cell."""
    return one_line(text).replace("|", "\\|")


def plain_table(
    title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str | None] = ()
) -> Table:
    """The same for a terminal. ``styles``: one for each row."""
    made = Table(title=title, title_justify="left")
    for name in heads:
        made.add_column(name, justify="left" if name == heads[0] else "right")
    for row, style in zip_longest(rows, styles):
        made.add_row(*row, style=style)
    return made
