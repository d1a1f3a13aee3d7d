"""Each kind of results file as tables. Rows are as the commands record them: nothing is added, and only ratios and
shares within one file are computed; across files only where a section is about that."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.layouts import latency
from benchmarks.reports.manifest import Kind
from benchmarks.reports.tables import COMPARISON_LEGEND, attention_cells, best_peer, comparison, given, markdown_table

Document = dict[str, Any]
Rows = list[dict[str, Any]]

TRACE_PARTS = {
    "gemm": "matrix products", "attention": "attention", "elementwise": "element-wise", "copy": "copies",
    "communication": "communication", "idle": "idle",
}  # fmt: skip

EXPOSED = "transfer_exposed"


def rows_of(document: Document) -> Rows:
    """The rows of a file of any kind, of all lengths; a file without is one row itself."""
    if "longest" in document:
        general = ("layout", "gpus", "dtype", "granularity", "shortest_not_fitting", "max_positions")
        return [{**{name: document[name] for name in general}, **document["longest"]}]
    if "completions" in document:
        prompts, new = ([c[name] for c in document["completions"]] for name in ("prompt_tokens", "token_ids"))
        return [{**document, "prompt_tokens": sum(prompts), "new_tokens": sum(map(len, new)), "batch": len(new)}]
    return list(document.get("sweep") or document["rows"])


def forward(documents: Sequence[Document], rows: Rows) -> list[str]:
    heads = ["", "TPS (tok/s)", "MFU", "step (ms)", "spread", "peak GiB", "MHz", "W"]
    cells = [
        [
            forward_name(r), f"{r['tps']:,.0f}", f"{100 * r['mfu']:.1f} %", f"{r['step_ms']:,.1f}",
            f"{100 * r['step_spread']:.1f} %", f"{r['peak_memory_gib']:.1f}", *_clock_and_power(r),
        ]
        for r in rows
    ]  # fmt: skip
    lines = markdown_table(*_without_empty_columns(heads, cells))
    traced = [r for r in rows if r.get("trace_window_ms")]
    if traced:
        shares = [
            [
                forward_name(r),
                f"{r['trace_window_ms']:,.1f}",
                *(_share(r, part) for part in (*TRACE_PARTS, EXPOSED)),
                given(r, f"trace_{EXPOSED}_ms_per_layer", ".2f"),
            ]
            for r in traced
        ]
        lines += ["", "Where a pass goes, by its trace:", ""]
        lines += markdown_table(
            *_without_empty_columns(["", "pass (ms)", *TRACE_PARTS.values(), "transfers shown", "a layer (ms)"], shares)
        )
    return lines


def forward_name(row: dict[str, Any]) -> str:
    layers = "transformers' own layers" if row.get("fusion") == "none" else "layers fused"
    if row["layout"] != "single":
        # Records of old say only whether there are two.
        lanes = row.get("in_flight", 2 if row.get("interleaved") else 1)
        flight = f" ({lanes} micro-batches in flight)" if lanes > 1 else ""
        layers = f"{row['layout']}{flight}, {layers}"
    return f"{layers}, B = {row['batch']}, L = {row['length']:,}, {row['mode'].replace('_', ' ')}"


def products(documents: Sequence[Document], rows: Rows) -> list[str]:
    heads = ["product", "rows", "implementation", "ms", "TFLOP/s", "over PyTorch", "MHz", "W", "algorithm"]
    cells = [
        [
            r["case"], f"{r['rows']:,}", r["impl"], f"{r['ms']:.3f}", f"{r['tflops']:.0f}",
            f"{100 * (r['over_pytorch'] - 1):+.1f} %" if "over_pytorch" in r else "-", *_clock_and_power(r),
            r["configuration"] or "-",
        ]
        for r in rows
    ]  # fmt: skip
    return markdown_table(*_without_empty_columns(heads, cells))


def transfers(documents: Sequence[Document], rows: Rows) -> list[str]:
    """Means of the way there and back; what GPUs did while they became warm is left out."""
    measured = [r for r in rows if r["phase"] != "warming"]
    heads = ["pulled meanwhile", "MiB a layer", "transfer (ms)", "layer (ms)", "", "MHz", "W", "deg C", "link awake"]
    cells, alone = [], None
    for traffic in dict.fromkeys(r["traffic"] for r in measured):
        r = _means([r for r in measured if r["traffic"] == traffic])
        alone = alone or r["layer_ms"]
        cells.append(
            [
                traffic, f"{r['nbytes'] / 2**20:,.0f}", given(r, "transfer_ms", ".2f"), f"{r['layer_ms']:.2f}",
                f"{100 * (r['layer_ms'] / alone - 1):+.1f} %", *_clock_and_power(r), given(r, "temperature_c", ".0f"),
                given(r, "link_awake", ".0%"),
            ]
        )  # fmt: skip
    lines = markdown_table(*_without_empty_columns(heads, cells))
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
        best = best_peer(group)
        for r in group:
            name = f"{r['impl']} *" if r is best else r["impl"]
            ms, tflops, share, *rest = attention_cells(r)
            # What only reads a cache does next to no arithmetic: its rate is that of memory.
            rates = ["-", "-"] if r.get("gbps") else [tflops, share]
            cells.append([case if r is group[0] else "", name, ms, *rates, *rest])
    heads, cells = _without_empty_columns(heads, cells)
    return [*markdown_table(heads, cells), "", "; ".join(ATTENTION_LEGEND[h] for h in heads if h in ATTENTION_LEGEND)]


ATTENTION_LEGEND = {
    "implementation": "*: the fastest in the file that is not ours",
    "share": "share: of a matrix product timed in turn with it",
    "GB/s": "GB/s: of keys and values read",
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
    heads, cells = _without_empty_columns(heads, cells)
    return [*markdown_table(heads, cells), "", "; ".join(PROFILE_LEGEND[h] for h in heads if h in PROFILE_LEGEND)]


def _spread(row: dict[str, Any]) -> str:
    """Of SMs' working cycles: those of the first to be done, and of all in the mean, over the last's."""
    names = ("sm_cycles_least", "sm_cycles_mean", "sm_cycles_most")
    least, mean, most = (row.get(name) for name in names)
    return f"{least / most:.3f} / {mean / most:.3f}" if least and mean and most else "-"


PROFILE_LEGEND = {
    "tensor": "tensor: cycles of the launch in which the tensor pipe works, all SMs",
    "useful": "useful: the case's FLOPs over what the pipe can do in those cycles, the rest being padded or masked",
    "SMs": "SMs: working cycles of the first that is done / of the mean, over the last's",
    "issue": "issue: slots in which an instruction is issued",
    "L1": "L1: its data pipe, shared memory's as well; L1, L2, DRAM: of the most that they can",
    "warps wait for": "warps wait for: the three most frequent reasons, of the time of all warps, loading ones as well",
}


def generation(documents: Sequence[Document], rows: Rows) -> list[str]:
    heads = [
        "layout", "decoding", "GPUs", "rows", "prompt tokens", "first token (ms)", "prefill (tok/s)", "new tokens",
        "ms a step", "x the bytes' time", "cache GiB a rank",
    ]  # fmt: skip
    cells = [
        [
            r["layout"], r.get("decode") or r["config"]["ds_ring"]["parallel"]["decode"], str(r["gpus"]),
            str(r["batch"]),
            f"{r['prompt_tokens']:,}", f"{r['ttft_ms']:,.0f}", f"{r['prefill_tokens_per_second']:,.0f}",
            f"{r['new_tokens']:,}", given(r, "decode_tpot_ms", ".2f"), given(r, "decode_over_floor", ".2f"),
            f"{r['cache_gib_per_rank']:.1f}",
        ]
        for r in rows
    ]  # fmt: skip
    return markdown_table(heads, cells)


def compared(documents: Sequence[Document], rows: Rows) -> list[str]:
    parts = [[f"B = {d['rows'][0]['batch']} x L = {d['rows'][0]['length']:,}:", "", *comparison(d)] for d in documents]
    return [*(line for part in parts for line in [*part, ""]), COMPARISON_LEGEND]


def one_sequence(documents: Sequence[Document], rows: Rows) -> list[str]:
    parts = [[f"{latency.caption(d)}:", "", *markdown_table(*latency.table(d)), ""] for d in documents]
    return [line for part in parts for line in part][:-1]


def longest(documents: Sequence[Document], rows: Rows) -> list[str]:
    heads = ["layout", "GPUs", "longest L that ran", "does not fit", "s", "tok/s", "peak GiB a rank"]
    cells = [
        [
            r["layout"], str(r["gpus"]), f"{r['length']:,}", _bound(r), f"{r['seconds']:.1f}",
            f"{r['tokens_per_second']:,.0f}", " / ".join(f"{gib:.1f}" for gib in r["peak_memory_gib"]),
        ]
        for r in rows
    ]  # fmt: skip
    return markdown_table(heads, cells)


def scaling(documents: Sequence[Document], rows: Rows) -> list[str]:
    """tok/s a GPU of each way to use them, and over the single GPU's, a column for each number of GPUs, which names
    them where not all are of one kind."""
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
    """The most tok/s a GPU by way to use them, whatever the degrees (``ring4`` and ``ring2`` are one), and number."""
    best: dict[str, dict[int, float]] = {}
    for row in rows:
        by_count = best.setdefault(re.sub(r"\d+", "", row["layout"]).replace("_", " x "), {})
        by_count[row["gpus"]] = max(row["tps_per_gpu"], by_count.get(row["gpus"], 0.0))
    return best


TABLES: dict[Kind, Callable[[Sequence[Document], Rows], list[str]]] = {
    "forward": forward, "products": products, "transfers": transfers, "attention": attention, "profile": profile,
    "generation": generation, "comparison": compared, "latency": one_sequence, "longest": longest, "scaling": scaling,
}  # fmt: skip


def _share(row: dict[str, Any], part: str) -> str:
    ms = row.get(f"trace_{part}_ms", 0.0)
    return f"{ms:,.1f} ms ({100 * ms / row['trace_window_ms']:.1f} %)" if ms else "-"


def _per_gpu(tps: float | None, alone: float | None) -> str:
    return "-" if tps is None else f"{tps:,.0f}" + (f" ({tps / alone:.3f})" if alone else "")


def _bound(row: dict[str, Any]) -> str:
    shortest = row["shortest_not_fitting"]
    return f"{shortest:,}" if shortest else f"not reached: the model has {row['max_positions']:,} positions"


def _clock_and_power(row: dict[str, Any]) -> list[str]:
    return [f"{row[name]:.0f}" if name in row else "-" for name in ("sm_clock_mhz", "power_w")]


def _without_empty_columns(heads: list[str], cells: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    kept = [i for i in range(len(heads)) if any(row[i] not in ("", "-") for row in cells)]
    return [heads[i] for i in kept], [[row[i] for i in kept] for row in cells]
