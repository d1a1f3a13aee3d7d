"""Pictures of the page's sections. Some kinds of sections have a table only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.reports import plots
from benchmarks.reports.manifest import Kind, Section
from benchmarks.reports.planner_tables import draw_planner
from benchmarks.reports.record_tables import TRACE_PARTS, Document, Rows, best_per_gpu, forward_name

Inches = tuple[float, float]
"""Width and height of a picture."""


def files(section: Section, documents: dict[str, Document], rows: Rows) -> list[str]:
    """Names of the section's pictures. The same records give the same names."""
    if section.kind in ("comparison", "latency"):
        return [f"{Path(name).stem}.png" for name in documents]
    first = Path(next(iter(documents))).stem
    if section.kind == "scaling":
        return [f"{first}_scaling.png"]  # the name without the suffix is taken by the comparison's own picture
    drawable = {
        "forward": any(r.get("trace_window_ms") for r in rows),
        "attention": any(r.get("share") and not r.get("gbps") for r in rows),
        "planner": True,
    }
    return [f"{first}.png"] if drawable.get(section.kind) else []


def draw(section: Section, documents: dict[str, Document], rows: Rows, folder: Path) -> None:
    """Every picture that ``files`` names."""
    names = files(section, documents, rows)
    if section.kind in ("comparison", "latency"):
        whole = plots.draw if section.kind == "comparison" else plots.draw_latency
        for name, document in zip(names, documents.values(), strict=True):
            whole(document, folder / name)
    for name in names if section.kind in AXES else []:
        figure, axis = plt.subplots(layout="constrained")
        figure.set_size_inches(AXES[section.kind](axis, section, rows))
        axis.spines[["top", "right"]].set_visible(False)
        plots.save(figure, folder / name)


def _forward(axis: Axes, section: Section, rows: Rows) -> Inches:
    traced = [r for r in rows if r.get("trace_window_ms")]
    names = [forward_name(r).split(", ") for r in traced]
    shared = set(names[0]).intersection(*names) if len(names) > 1 else set()
    labels = [", ".join(part for part in name if part not in shared) for name in names]
    left = [0.0] * len(traced)
    for part, label in TRACE_PARTS.items():
        widths = [r.get(f"trace_{part}_ms", 0.0) for r in traced]
        axis.barh(labels, widths, left=left, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.set_xlabel(", ".join(["ms of a pass", *(part for part in names[0] if part in shared)]))
    axis.set_ylim(-0.6, len(traced) - 0.4)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=7, frameon=False)
    return 9, 1.7 + 0.5 * len(traced)


def _attention(axis: Axes, section: Section, rows: Rows) -> Inches:
    """A bar for every implementation's share of the product's rate, and a line at its target."""
    shown = [r for r in rows if r.get("share")][::-1]
    for y, row in enumerate(shown):
        colour = plots.KIND_COLOURS["sequence parallel" if row["impl"].startswith("ds_ring") else "baseline"]
        axis.barh(y, row["share"], color=colour)
        for target in section.targets:
            if target.figure == "share" and target.at_least and all(row.get(k) == v for k, v in target.of.items()):
                axis.plot([target.at_least] * 2, [y - 0.4, y + 0.4], color="black", linewidth=2)
    axis.set_yticks(range(len(shown)), [f"{r['case']}, {r['impl']}" for r in shown], fontsize=7)
    axis.set_ylim(-0.7, len(shown) - 0.3)
    axis.set_xlabel("share of a matrix product's rate; line: wanted")
    return 9, 1 + 0.16 * len(shown)


def _scaling(axis: Axes, section: Section, rows: Rows) -> Inches:
    joined = "-" if len({row["device"] for row in rows}) == 1 else ""  # points of unlike cards make no line
    for family, by_count in best_per_gpu(rows).items():
        axis.plot(list(by_count), list(by_count.values()), marker="o", linestyle=joined, label=family)
    axis.set_xticks(sorted({r["gpus"] for r in rows}))
    axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    axis.set_xlabel("GPUs")
    axis.set_ylabel("tokens / s a GPU")
    axis.legend(fontsize=8, frameon=False)
    return 6.5, 4.5


AXES: dict[Kind, Callable[[Axes, Section, Rows], Inches]] = {
    "forward": _forward, "attention": _attention, "scaling": _scaling, "planner": draw_planner,
}  # fmt: skip
