"""Targets against measured figures. A missed target is shown as missed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.reports.manifest import Selector, Target

HEADS = ("target", "measured", "wanted", "")


@dataclass(frozen=True)
class Result:
    """``measured`` is None where no row has the figure."""

    target: Target
    measured: float | None

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        low, high = self.target.at_least, self.target.at_most
        return self.measured >= low if low is not None else self.measured <= (high or 0.0)

    def cells(self) -> list[str]:
        """Of a table with ``HEADS``."""
        text = {None: "not measured", True: "met", False: "**missed**"}[self.met]
        limit = _limit(self.target)
        if self.met is False and self.measured is not None and limit:
            text += f" by {100 * abs(self.measured / limit - 1):.1f} %"
        measured = "-" if self.measured is None else number(self.measured)
        return [self.target.what, measured, wanted(self.target), text]


def evaluate(target: Target, rows: Sequence[dict[str, Any]]) -> Result:
    """The worst figure of the rows that the target selects."""
    found = [value for row in _select(rows, target.of) if (value := _value(target, row, rows)) is not None]
    worst = min if target.at_least is not None else max
    return Result(target, worst(found) if found else None)


def wanted(target: Target) -> str:
    return f"{'≥' if target.at_least is not None else '≤'} {number(_limit(target))}"


def number(value: float) -> str:
    """With three significant digits, or all digits before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _value(target: Target, row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> float | None:
    value = row.get(target.figure)
    if target.over is None and target.over_figure is None:
        return value
    others = [row] if target.over is None else _select(rows, target.over)
    below = [other[name] for other in others if other.get(name := target.over_figure or target.figure)]
    return None if value is None or not below else value / max(below)


def _limit(target: Target) -> float:
    return target.at_least if target.at_least is not None else target.at_most or 0.0


def _select(rows: Sequence[dict[str, Any]], selector: Selector) -> list[dict[str, Any]]:
    return [row for row in rows if all(row.get(name) == value for name, value in selector.items())]
