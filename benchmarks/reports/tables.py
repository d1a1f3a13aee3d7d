"""The paper's table, on the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

from rich.table import Table

COLUMNS = ("layout", "TPS (tok/s)", "TPOT (ms)", "vs TP/PP", "vs DP", "MFU", "sent/rank", "comm shown", "max error")


def name_of(row: dict[str, Any]) -> str:
    """The layout, and the mode where it is no whole forward."""
    whole = row.get("mode", "full") == "full"
    return str(row["layout"]) if whole else f"{row['layout']} ({row['mode'].replace('_', ' ')})"


def table(rows: list[dict[str, Any]], failed: Sequence[dict[str, Any]] = ()) -> tuple[list[str], list[list[str]]]:
    """(heads, cells) of the paper's table; ``failed``: layouts without a row, and why."""
    swept = any("micro_batches" in row for row in rows) or len({row["micro_batch"] for row in rows}) > 1
    heads = ["layout", "micro-batch", *COLUMNS[1:]] if swept else list(COLUMNS)
    cells = [_cells(row, swept) for row in rows]
    missing = [[f["layout"], f"failed: {f['reason']}", *("" for _ in heads[2:])] for f in failed]
    return heads, cells + missing


def _cells(row: dict[str, Any], swept: bool) -> list[str]:
    tried = f" of {', '.join(map(str, row['micro_batches']))}" if "micro_batches" in row else ""
    sizes = [f"{row['micro_batch']}{tried}"] if swept else []
    return [
        name_of(row),
        *sizes,
        f"{row['tps']:,.0f}",
        f"{row['tpot_ms']:.4g}",
        _change(row.get("vs_baseline")),
        _change(row.get("vs_dp")),
        f"{100 * row['mfu']:.1f} %",
        f"{row['bytes_sent_per_rank'] / 2**20:,.1f} MiB",
        _shown(row),
        given(row, "max_rel_error", ".1e"),
    ]


def given(row: dict[str, Any], name: str, style: str) -> str:
    """A figure, or a dash where the row has none."""
    return "-" if row.get(name) is None else format(row[name], style)


def _shown(row: dict[str, Any]) -> str:
    exposed = row["comm_exposed_ms"]
    return "-" if exposed is None else f"{exposed:.1f} of {row['step_ms']:.1f} ms"


def _change(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100 * (ratio - 1):+.1f} %"


def caption(rows: list[dict[str, Any]]) -> str:
    r = rows[0]
    whole = any(row.get("mode", "full") == "full" for row in rows)
    return (
        f"B = {r['batch']} x L = {r['length']}, {r['dtype']}, {r['gpus']} ranks of {r['device']}; one "
        f"{'full forward (prefill)' if whole else 'prefill of what the next token needs'}, logits of the last token"
    )


def terminal_table(rows: list[dict[str, Any]], failed: Sequence[dict[str, Any]] = ()) -> Table:
    heads, cells = table(rows, failed)
    wrong = [row.get("agrees") is False for row in rows] + [True for _ in failed]
    return plain_table(caption(rows), heads, cells, ["red" if w else None for w in wrong])


def products_table(rows: list[dict[str, Any]]) -> Table:
    """Rows of ``bench_products.run``."""
    heads = ["product", "M", "implementation", "ms", "TFLOP/s", "over PyTorch", "MHz", "W", "algorithm"]
    cells = [
        [
            row["case"], f"{row['rows']:,}", row["impl"], f"{row['ms']:.3f}", f"{row['tflops']:.1f}",
            _change(row.get("over_pytorch")), given(row, "sm_clock_mhz", ".0f"), given(row, "power_w", ".0f"),
            row["configuration"],
        ]
        for row in rows
    ]  # fmt: skip
    return plain_table("A layer's matrix products; MHz, W: while each ran alone", heads, cells)


def transfers_table(rows: list[dict[str, Any]]) -> Table:
    """Rows of ``bench_transfers.run``."""
    heads = [
        "",
        "pulled meanwhile",
        "MiB a layer",
        "transfer (ms)",
        "layer (ms)",
        "MHz",
        "W",
        "deg C",
        "J a layer",
        "awake",
    ]
    cells = [
        [
            f"warming, second {row['second']}" if "second" in row else row["phase"], row["traffic"],
            f"{row['nbytes'] / 2**20:,.1f}", f"{row['transfer_ms']:.2f}", f"{row['layer_ms']:.3f}",
            given(row, "sm_clock_mhz", ".0f"), given(row, "power_w", ".0f"), given(row, "temperature_c", ".0f"),
            given(row, "energy_j", ".2f"), given(row, "link_awake", ".0%"),
        ]
        for row in rows
    ]  # fmt: skip
    return plain_table(
        "A layer's matrix products on every GPU while it pulls from the next; awake: share of time, its first link",
        heads,
        cells,
    )


def layer_fusion_table(rows: list[dict[str, Any]]) -> Table:
    """Rows of ``layer_fusion.run``."""
    columns = {
        "tok/s": ("tps", ",.0f"), "ms": ("ms", ".2f"), "compile (s)": ("compile_s", ".1f"),
        "graphs": ("graphs_of_all_layers", "d"), "recompiled": ("recompiles", "d"), "breaks": ("graph_breaks", "d"),
        "GiB": ("peak_memory_gib", ".1f"), "error": ("rel_error", ".1e"), "MHz": ("sm_clock_mhz", ".0f"),
        "W": ("power_w", ".0f"), "J": ("energy_j", ".1f"),
    }  # fmt: skip
    cells = [
        [
            f"{row['case']}, {row['batch']} x {row['length']:,}", row["variant"], _change(row.get("over_fusion")),
            *(given(row, *column) for column in columns.values()), row.get("error", "").partition("\n")[0][:80],
        ]
        for row in rows
    ]  # fmt: skip
    heads = ["case", "variant", "vs fusion", *columns, "failed"]
    return plain_table("Decoder layers of one GPU; error: against transformers' layers", heads, cells)


ATTENTION_COLUMNS = ("case, implementation", "ms", "TFLOP/s", "share", "GB/s", "error", "lse error", "MHz", "W", "note")
STATE_COSTS = (("carrying costs", "carry_cost_ms"), ("merging costs", "merge_cost_ms"))
WRONG = 1e-2
"""A relative error that no rounding of fp16 explains."""


def attention_table(rows: list[dict[str, Any]]) -> Table:
    """Rates of attention blocks, case by case: rows of ``bench_attention.run``."""
    table = Table(
        title="Attention, fp16. share: of the matrix product timed in turn with it; MHz, W: while it ran alone; "
        "*: the fastest that is not ours",
        title_justify="left",
    )
    first, *middle, last = ATTENTION_COLUMNS
    table.add_column(first, no_wrap=True)
    for name in middle:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(last)
    for case in dict.fromkeys(r["case"] for r in rows):
        table.add_section()
        table.add_row(case, style="bold")
        group = [r for r in rows if r["case"] == case]
        best = best_peer(group)
        for r in group:
            name = f"  {r['impl']} *" if r is best else f"  {r['impl']}"
            table.add_row(name, *attention_cells(r), style=None if _is_right(r) else "red")
    return table


def best_peer(group: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest of one case's rows that is right and not ours."""
    peers = [r for r in group if _is_right(r) and not r["impl"].startswith("ds_ring")]
    return min(peers, key=lambda r: r["ms"], default=None)


def _is_right(row: dict[str, Any]) -> bool:
    return "error" not in row and bool(row["rel_error"] < WRONG)


def attention_cells(r: dict[str, Any]) -> list[str]:
    if "error" in r:
        return [*("-" for _ in ATTENTION_COLUMNS[2:]), r["error"]]
    costs = [f"{word} {r[name]:+.3f} ms" for word, name in STATE_COSTS if name in r]
    return [
        f"{r['ms']:.3f}",
        f"{r['tflops']:.1f}",
        f"{r['share']:.2f}",
        given(r, "gbps", ",.0f"),
        f"{r['rel_error']:.1e}",
        given(r, "lse_error", ".1e"),
        given(r, "sm_clock_mhz", ".0f"),
        given(r, "power_w", ".0f"),
        "; ".join([*costs, r["detail"]]),
    ]


def markdown(document: dict[str, Any]) -> str:
    """The same table, the sweep over lengths, what the columns mean, and how it was made."""
    lines = [f"# {caption(document['rows'])}", "", *comparison(document)]
    return "\n".join([*lines, "", COMPARISON_LEGEND, "", origin(document), ""])


COMPARISON_LEGEND = (
    "TPS: tokens of one forward / its wall time, all ranks together. TPOT: B / TPS, as the paper has it. vs TP/PP: "
    "TPS against the fastest tensor/pipeline layout here. sent/rank: bytes counted in one forward. comm shown: "
    "step time less the step with communication left out (a pipeline's bubble counts). max error: of the worst "
    "token, against the unsharded model."
)


def comparison(document: dict[str, Any]) -> list[str]:
    """Lines of Markdown: the paper's table and, of several lengths or micro-batches, TPS by them."""
    rows, sweep = document["rows"], document.get("sweep", [])
    lines = markdown_table(*table(rows, document.get("failed", [])))
    if len({row["length"] for row in sweep}) > 1:
        lines += ["", "TPS by length:", "", *_tps_by("length", sweep)]
    if sizes := document.get("micro_batches"):
        own = [row for row in sizes if row["length"] == rows[0]["length"]]
        lines += ["", "TPS by size of micro-batch:", "", *_tps_by("micro_batch", own)]
    return lines


def _tps_by(field: str, rows: list[dict[str, Any]]) -> list[str]:
    values = sorted({r[field] for r in rows})
    by_layout = []
    for layout in dict.fromkeys(map(name_of, rows)):
        tps = {r[field]: r["tps"] for r in rows if name_of(r) == layout}
        by_layout.append([layout, *(f"{tps[n]:,.0f}" if n in tps else "-" for n in values)])
    return markdown_table(["layout", *map(str, values)], by_layout)


def origin(document: dict[str, Any]) -> str:
    """The command that made a results file, the commit it ran at, when, and with which versions."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return f"`{document['command']}` at {document['git']}, {document['date']}; {versions}"


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table whose columns after the first are figures."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def plain_table(
    title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str | None] = ()
) -> Table:
    """The same for a terminal; ``styles``: of each row."""
    made = Table(title=title, title_justify="left")
    for name in heads:
        made.add_column(name, justify="left" if name == heads[0] else "right")
    for row, style in zip_longest(rows, styles):
        made.add_row(*row, style=style)
    return made


def plan_table(rows: list[dict[str, Any]]) -> Table:
    """Layouts and what is predicted of them: rows of ``plan.row``, best first."""
    table = Table(title="Predicted, best first; red: does not fit", title_justify="left")
    for name in ("layout", "in flight", "TPS (tok/s)", "step", "comm and bubble", "memory"):
        table.add_column(name, justify="left" if name == "layout" else "right")
    for r in rows:
        table.add_row(
            r["layout"], str(r["in_flight"]), f"{r['tps']:,.0f}", f"{r['step_ms']:,.1f} ms",
            f"{r['exposed_ms']:,.1f} ms", f"{r['memory_gib']:.1f} GiB", style=None if r["fits"] else "red",
        )  # fmt: skip
    return table
