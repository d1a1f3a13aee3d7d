"""Results files of benchmarks of kernels as Markdown tables for the performance page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.reports.kernel_tables import attention_cells, fastest_baseline, layer_fusion_cells, product_cells
from benchmarks.reports.tables import clock_and_power, given, markdown_table, without_empty_columns

Document = dict[str, Any]
Rows = list[dict[str, Any]]


def products(documents: Sequence[Document], rows: Rows) -> list[str]:
    return markdown_table(*without_empty_columns(*product_cells(rows)))


def layer_fusion(documents: Sequence[Document], rows: Rows) -> list[str]:
    return _with_legend(*layer_fusion_cells(rows), LAYER_FUSION_LEGEND)


LAYER_FUSION_LEGEND = {
    "case": "case: model, B x L",
    "vs fusion": "vs fusion: tok/s against our fusion in the same case",
    "compile (s)": "compile: how much longer the first pass of a length takes than the second",
    "error": "error: relative, of final hidden states against transformers' layers",
    "MHz": "MHz, W, J: clock, power and energy of a pass",
}


def transfers(documents: Sequence[Document], rows: Rows) -> list[str]:
    """Means of each traffic's two measurements. Rows of the time in which GPUs became warm are left out."""
    measured = [r for r in rows if r["phase"] != "warming"]
    heads = ["pulled meanwhile", "MiB a layer", "transfer (ms)", "layer (ms)", "", "MHz", "W", "deg C", "link awake"]
    cells, alone = [], None
    for traffic in dict.fromkeys(r["traffic"] for r in measured):
        r = _means([r for r in measured if r["traffic"] == traffic])
        alone = alone or r["layer_ms"]
        cells.append(
            [
                traffic, f"{r['nbytes'] / 2**20:,.0f}", given(r, "transfer_ms", ".2f"), f"{r['layer_ms']:.2f}",
                f"{100 * (r['layer_ms'] / alone - 1):+.1f} %", *clock_and_power(r), given(r, "temperature_c", ".0f"),
                given(r, "link_awake", ".0%"),
            ]
        )  # fmt: skip
    lines = markdown_table(*without_empty_columns(heads, cells))
    times = [f"{ms:g} ms" for d in documents if (ms := d.get("link_sleeps_after_ms")) is not None]
    return [*lines, "", f"A link goes to sleep after {', '.join(times)} without traffic."] if times else lines


def _means(rows: Rows) -> dict[str, Any]:
    return {
        name: statistics.mean(r[name] for r in rows)
        for name, value in rows[0].items()
        if isinstance(value, int | float) and all(name in r for r in rows)
    }


def attention(documents: Sequence[Document], rows: Rows) -> list[str]:
    heads = ["case", "implementation", "ms", "TFLOP/s", "share", "GB/s", "error", "lse error", "MHz", "W", "note"]
    cells = []
    for case in dict.fromkeys(r["case"] for r in rows):
        group = [r for r in rows if r["case"] == case]
        best = fastest_baseline(group)
        for r in group:
            name = f"{r['impl']} *" if r is best else r["impl"]
            ms, tflops, share, *rest = attention_cells(r)
            # Reading a cache is hardly any arithmetic: its rate is that of memory.
            rates = ["-", "-"] if r.get("gbps") else [tflops, share]
            cells.append([case if r is group[0] else "", name, ms, *rates, *rest])
    return _with_legend(heads, cells, ATTENTION_LEGEND)


ATTENTION_LEGEND = {
    "implementation": "*: the fastest in the file that is not ours",
    "share": "share: the rate over that of a matrix product timed in turn with it",
    "GB/s": "GB/s: keys and values read",
    "error": "error: relative, against fp64",
    "MHz": "MHz and W: while it ran alone",
}


def profile(documents: Sequence[Document], rows: Rows) -> list[str]:
    heads = ["case", "ms", "MHz", "tensor", "useful", "SMs", "issue", "L1", "L2", "L2 hits", "DRAM", "warps wait for"]
    shares = ("issue_busy", "l1_busy", "l2_busy", "l2_hit", "dram_busy")
    cells = [
        [
            r["case"], given(r, "ms", ".3f"), given(r, "sm_clock_mhz", ".0f"), given(r, "tensor_busy", ".1%"),
            given(r, "useful", ".3f"), _spread(r), *(given(r, name, ".0%") for name in shares),
            ", ".join(f"{reason} {share:.0%}" for reason, share in list(r.get("stalls", {}).items())[:3]),
        ]
        for r in rows
    ]  # fmt: skip
    return _with_legend(heads, cells, PROFILE_LEGEND)


def _spread(row: dict[str, Any]) -> str:
    """Working cycles of the first SM to finish, and of the mean SM, ÷ those of the last."""
    names = ("sm_cycles_least", "sm_cycles_mean", "sm_cycles_most")
    least, mean, most = (row.get(name) for name in names)
    return f"{least / most:.3f} / {mean / most:.3f}" if least and mean and most else "-"


PROFILE_LEGEND = {
    "tensor": "tensor: cycles of the launch in which the tensor pipe works, all SMs",
    "useful": "useful: the case's FLOPs over those that the pipe can do in these cycles; the rest are padded or masked",
    "SMs": "SMs: working cycles of the first SM to end / of the mean, over those of the last",
    "issue": "issue: slots in which an instruction is issued",
    "L1": "L1: its data pipe, which shared memory uses too; L1, L2, DRAM: over their peak",
    "warps wait for": "warps wait for: the three most frequent reasons, as shares of all warps' time (also loading)",
}


def _with_legend(heads: list[str], cells: list[list[str]], legend: dict[str, str]) -> list[str]:
    """A table without its empty columns, and what the others mean."""
    heads, cells = without_empty_columns(heads, cells)
    return [*markdown_table(heads, cells), "", "; ".join(legend[head] for head in heads if head in legend)]
