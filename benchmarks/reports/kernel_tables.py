"""Benchmarks of kernels as tables for the terminal: products, transfers, fused layers and attention."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from benchmarks.reports.tables import change, clock_and_power, given, plain_table


def product_cells(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(heads, cells) of rows of ``bench_products``. Only older records name an algorithm."""
    heads = ["product", "rows", "implementation", "ms", "TFLOP/s", "over PyTorch", "MHz", "W", "algorithm"]
    cells = [
        [
            row["case"], f"{row['rows']:,}", row["impl"], f"{row['ms']:.3f}", f"{row['tflops']:.0f}",
            change(row.get("over_pytorch")), *clock_and_power(row), row.get("configuration") or "-",
        ]
        for row in rows
    ]  # fmt: skip
    return heads, cells


def products_table(rows: list[dict[str, Any]]) -> Table:
    return plain_table("A layer's matrix products; MHz, W: while each ran alone", *product_cells(rows))


def transfers_table(rows: list[dict[str, Any]]) -> Table:
    """Rows of ``bench_transfers``."""
    heads = [
        "", "pulled meanwhile", "MiB a layer", "transfer (ms)", "layer (ms)", "MHz", "W", "deg C", "J a layer", "awake",
    ]  # fmt: skip
    cells = [
        [
            f"warming, second {row['second']}" if "second" in row else row["phase"], row["traffic"],
            f"{row['nbytes'] / 2**20:,.1f}", f"{row['transfer_ms']:.2f}", f"{row['layer_ms']:.3f}",
            *clock_and_power(row), given(row, "temperature_c", ".0f"), given(row, "energy_j", ".2f"),
            given(row, "link_awake", ".0%"),
        ]
        for row in rows
    ]  # fmt: skip
    title = "A layer's matrix products on every GPU while it pulls from the next; awake: share of time, its first link"
    return plain_table(title, heads, cells)


def layer_fusion_cells(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(heads, cells) of rows of ``bench_layer_fusion``."""
    columns = {
        "tok/s": ("tps", ",.0f"), "ms": ("ms", ".2f"), "compile (s)": ("compile_s", ".1f"),
        "graphs": ("graphs_of_all_layers", "d"), "recompiled": ("recompiles", "d"), "breaks": ("graph_breaks", "d"),
        "GiB": ("peak_memory_gib", ".1f"), "error": ("rel_error", ".1e"), "MHz": ("sm_clock_mhz", ".0f"),
        "W": ("power_w", ".0f"), "J": ("energy_j", ".1f"),
    }  # fmt: skip
    cells = [
        [
            f"{row['case']}, {row['batch']} x {row['length']:,}", row["variant"], change(row.get("over_fusion")),
            *(given(row, *column) for column in columns.values()), row.get("error", "").partition("\n")[0][:80],
        ]
        for row in rows
    ]  # fmt: skip
    return ["case", "variant", "vs fusion", *columns, "failed"], cells


def layer_fusion_table(rows: list[dict[str, Any]]) -> Table:
    title = "Decoder layers of one GPU; error: against transformers' layers"
    return plain_table(title, *layer_fusion_cells(rows))


ATTENTION_COLUMNS = ("case, implementation", "ms", "TFLOP/s", "share", "GB/s", "error", "lse error", "MHz", "W", "note")
STATE_COSTS = (("carrying costs", "carry_cost_ms"), ("merging costs", "merge_cost_ms"))
WRONG = 1e-2
"""A relative error above this is not rounding in fp16."""


def attention_table(rows: list[dict[str, Any]]) -> Table:
    """Rates of attention blocks by case: rows of ``bench_attention``."""
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
        best = fastest_baseline(group)
        for r in group:
            name = f"  {r['impl']} *" if r is best else f"  {r['impl']}"
            table.add_row(name, *attention_cells(r), style=None if _is_right(r) else "red")
    return table


def fastest_baseline(group: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest of one case's rows that is right and not ours."""
    baselines = [r for r in group if _is_right(r) and not r["impl"].startswith("ds_ring")]
    return min(baselines, key=lambda r: r["ms"], default=None)


def _is_right(row: dict[str, Any]) -> bool:
    return "error" not in row and bool(row["rel_error"] < WRONG)


def attention_cells(r: dict[str, Any]) -> list[str]:
    """The cells after the first."""
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
        *clock_and_power(r),
        "; ".join([*costs, r["detail"]]),
    ]
