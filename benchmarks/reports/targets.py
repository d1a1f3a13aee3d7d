"""What was wanted beside what was measured; what was missed is said to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.reports.manifest import Bar, Selector


@dataclass(frozen=True)
class Outcome:
    """``measured`` is None where no row has the figure."""

    bar: Bar
    measured: float | None

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        low, high = self.bar.at_least, self.bar.at_most
        return self.measured >= low if low is not None else self.measured <= (high or 0.0)

    def cells(self) -> list[str]:
        verdict = {None: "not measured", True: "met", False: "**missed**"}[self.met]
        wanted = _wanted(self.bar)
        if self.met is False and self.measured is not None and wanted:
            verdict += f" by {100 * abs(self.measured / wanted - 1):.1f} %"
        return [self.bar.what, "-" if self.measured is None else number(self.measured), sought(self.bar), verdict]


HEADS = ("wanted of", "measured", "wanted", "")


def judge(bar: Bar, rows: Sequence[dict[str, Any]]) -> Outcome:
    found = [value for row in _select(rows, bar.of) if (value := _value(bar, row, rows)) is not None]
    worst = min if bar.at_least is not None else max
    return Outcome(bar, worst(found) if found else None)


def sought(bar: Bar) -> str:
    return f"{'≥' if bar.at_least is not None else '≤'} {number(_wanted(bar))}"


def number(value: float) -> str:
    """Three digits that count, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _value(bar: Bar, row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> float | None:
    value = row.get(bar.figure)
    if bar.over is None and bar.over_figure is None:
        return value
    others = [row] if bar.over is None else _select(rows, bar.over)
    below = [other[name] for other in others if other.get(name := bar.over_figure or bar.figure)]
    return None if value is None or not below else value / max(below)


def _wanted(bar: Bar) -> float:
    return bar.at_least if bar.at_least is not None else bar.at_most or 0.0


def _select(rows: Sequence[dict[str, Any]], selector: Selector) -> list[dict[str, Any]]:
    return [row for row in rows if all(row.get(name) == value for name, value in selector.items())]
