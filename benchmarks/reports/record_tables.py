"""Each kind of results file as Markdown tables for the performance page.

Rows are shown as they were recorded. Only ratios and shares within one file are computed, and across files only in
sections that are about several.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.reports import comparison_table, latency_table
from benchmarks.reports.kernel_record_tables import attention, layer_fusion, products, profile, transfers
from benchmarks.reports.manifest import Kind
from benchmarks.reports.planner_tables import planner
from benchmarks.reports.tables import clock_and_power, given, markdown_table, without_empty_columns

Document = dict[str, Any]
Rows = list[dict[str, Any]]

TRACE_PARTS = {
    "gemm": "matrix products", "attention": "attention", "elementwise": "element-wise", "copy": "copies",
    "communication": "communication", "idle": "idle",
}  # fmt: skip
EXPOSED = "transfer_exposed"


def rows_of(document: Document) -> Rows:
    """The rows of a file of any kind, of all lengths. A file without rows is one row itself."""
    if "longest" in document:
        general = ("layout", "gpus", "dtype", "granularity", "shortest_not_fitting", "max_positions")
        return [{**{name: document[name] for name in general}, **document["longest"]}]
    if "completions" in document:
        prompts, new = ([c[name] for c in document["completions"]] for name in ("prompt_tokens", "token_ids"))
        return [{**document, "prompt_tokens": sum(prompts), "new_tokens": sum(map(len, new)), "batch": len(new)}]
    return list(document.get("sweep") or document.get("rows") or [document])


def forward(documents: Sequence[Document], rows: Rows) -> list[str]:
    heads = ["", "TPS (tok/s)", "MFU", "step (ms)", "spread", "peak GiB", "MHz", "W"]
    cells = [
        [
            forward_name(r), f"{r['tps']:,.0f}", f"{100 * r['mfu']:.1f} %", f"{r['step_ms']:,.1f}",
            f"{100 * r['step_spread']:.1f} %", f"{r['peak_memory_gib']:.1f}", *clock_and_power(r),
        ]
        for r in rows
    ]  # fmt: skip
    lines = markdown_table(*without_empty_columns(heads, cells))
    traced = [r for r in rows if r.get("trace_window_ms")]
    if traced:
        heads = ["", "pass (ms)", *TRACE_PARTS.values(), "transfers shown", "a layer (ms)"]
        cells = [
            [
                forward_name(r), f"{r['trace_window_ms']:,.1f}", *(_share(r, part) for part in (*TRACE_PARTS, EXPOSED)),
                given(r, f"trace_{EXPOSED}_ms_per_layer", ".2f"),
            ]
            for r in traced
        ]  # fmt: skip
        lines += ["", "Where a pass goes, by its trace:", "", *markdown_table(*without_empty_columns(heads, cells))]
    return lines


def forward_name(row: dict[str, Any]) -> str:
    layers = "transformers' own layers" if row.get("fusion") == "none" else "layers fused"
    if row["layout"] != "single":
        # Old records say only whether there are two.
        lanes = row.get("in_flight", 2 if row.get("interleaved") else 1)
        flight = f" ({lanes} micro-batches in flight)" if lanes > 1 else ""
        layers = f"{row['layout']}{flight}, {layers}"
    return f"{layers}, B = {row['batch']}, L = {row['length']:,}, {row['mode'].replace('_', ' ')}"


def generation(documents: Sequence[Document], rows: Rows) -> list[str]:
    heads = [
        "layout", "decoding", "GPUs", "rows", "prompt tokens", "first token (ms)", "prefill (tok/s)", "new tokens",
        "ms a step", "x the bytes' time", "cache GiB a rank",
    ]  # fmt: skip
    cells = [
        [
            r["layout"], r.get("decode") or r["config"]["ds_ring"]["parallel"]["decode"], str(r["gpus"]),
            str(r["batch"]), f"{r['prompt_tokens']:,}", f"{r['ttft_ms']:,.0f}",
            f"{r['prefill_tokens_per_second']:,.0f}", f"{r['new_tokens']:,}", given(r, "decode_tpot_ms", ".2f"),
            given(r, "decode_over_floor", ".2f"), f"{r['cache_gib_per_rank']:.1f}",
        ]
        for r in rows
    ]  # fmt: skip
    return markdown_table(heads, cells)


def compared(documents: Sequence[Document], rows: Rows) -> list[str]:
    lines = []
    for document in documents:
        first = document["rows"][0]
        lines += [f"B = {first['batch']} x L = {first['length']:,}:", "", *comparison_table.comparison(document), ""]
    return [*lines, comparison_table.LEGEND]


def one_sequence(documents: Sequence[Document], rows: Rows) -> list[str]:
    lines = []
    for document in documents:
        lines += [f"{latency_table.caption(document)}:", "", *markdown_table(*latency_table.table(document)), ""]
    return lines[:-1]


def longest(documents: Sequence[Document], rows: Rows) -> list[str]:
    heads = ["layout", "GPUs", "longest L that ran", "does not fit", "s", "tok/s", "peak GiB a rank"]
    cells = [
        [
            r["layout"], str(r["gpus"]), f"{r['length']:,}", _shortest_not_fitting(r), f"{r['seconds']:.1f}",
            f"{r['tokens_per_second']:,.0f}", " / ".join(f"{gib:.1f}" for gib in r["peak_memory_gib"]),
        ]
        for r in rows
    ]  # fmt: skip
    return markdown_table(heads, cells)


def scaling(documents: Sequence[Document], rows: Rows) -> list[str]:
    """tok/s a GPU of each family of layouts and, in brackets, ÷ a single GPU's.

    There is a column for each number of GPUs. It names them where not all are of one kind."""
    best = best_per_gpu(rows)
    counts = sorted({count for by_count in best.values() for count in by_count})
    alone = best.get("single", {}).get(1)
    cells = [[family, *(_per_gpu(found.get(n), alone) for n in counts)] for family, found in best.items()]
    kinds = {n: ", ".join(sorted({row["device"] for row in rows if row["gpus"] == n})) for n in counts}
    alike = len(set(kinds.values())) == 1
    heads = [f"{n} GPU{'s' * (n > 1)}" + ("" if alike else f" ({kinds[n]})") for n in counts]
    legend = "tok/s a GPU; in brackets: over one GPU's."
    return [*markdown_table(["layout", *heads], cells), "", legend]


def best_per_gpu(rows: Rows) -> dict[str, dict[int, float]]:
    """The most tok/s a GPU, by family of layouts and number of GPUs. ``ring4`` and ``ring2`` are one family."""
    best: dict[str, dict[int, float]] = {}
    for row in rows:
        by_count = best.setdefault(re.sub(r"\d+", "", row["layout"]).replace("_", " x "), {})
        by_count[row["gpus"]] = max(row["tps_per_gpu"], by_count.get(row["gpus"], 0.0))
    return best


def checkpoint(documents: Sequence[Document], rows: Rows) -> list[str]:
    """What a trained checkpoint computes, beside transformers on one GPU."""
    heads = [
        "layout", "GPUs", "tokens of text", "perplexity", "transformers'", "transformers' in fp32",
        "greedy tokens equal to transformers'",
    ]  # fmt: skip
    cells = [
        [
            f"{r['layout']}, {r['dtype']}", str(r["gpus"]), f"{r['tokens_of_text']:,}",
            *(f"{r[name]:.4f}" for name in ("perplexity", "reference_perplexity", "fp32_perplexity")),
            f"{r['equal_tokens']} of {r['reference_tokens']}",
        ]
        for r in rows
    ]  # fmt: skip
    return markdown_table(heads, cells)


TABLES: dict[Kind, Callable[[Sequence[Document], Rows], list[str]]] = {
    "forward": forward, "products": products, "transfers": transfers, "attention": attention, "profile": profile,
    "generation": generation, "comparison": compared, "latency": one_sequence, "longest": longest, "scaling": scaling,
    "layer_fusion": layer_fusion, "checkpoint": checkpoint, "planner": planner,
}  # fmt: skip


def _share(row: dict[str, Any], part: str) -> str:
    ms = row.get(f"trace_{part}_ms", 0.0)
    return f"{ms:,.1f} ms ({100 * ms / row['trace_window_ms']:.1f} %)" if ms else "-"


def _per_gpu(tps: float | None, alone: float | None) -> str:
    return "-" if tps is None else f"{tps:,.0f}" + (f" ({tps / alone:.3f})" if alone else "")


def _shortest_not_fitting(row: dict[str, Any]) -> str:
    shortest = row["shortest_not_fitting"]
    return f"{shortest:,}" if shortest else f"not reached: the model has {row['max_positions']:,} positions"
