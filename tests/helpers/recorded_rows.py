"""What GPUs recorded of our own layouts, and the run that a row is of."""

from __future__ import annotations

import json
from typing import Any

from ds_ring.config import RunConfig
from ds_ring.process.launcher import ROOT

IN_FLIGHT = {"gpu2": 16, "gpu2_two_in_flight": 2, "latency_gpu2": 2, "trace_tp2": 2}
"""By record, where its rows do not say so themselves."""
DEGREES = ("dp_size", "pp_size", "tp_size", "ring_degree", "ulysses_degree")


def rows_of(name: str) -> list[dict[str, Any]]:
    """Each layout, size of micro-batch, length and mode once, with ``in_flight``."""
    document = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    rows = {
        tuple(row[key] for key in ("layout", "micro_batch", "length", "mode")): row
        for part in ("micro_batches", "sweep", "rows")
        for row in document.get(part, [])
        if row["implementation"] == "ds_ring" and row["fusion"] == "auto"
    }
    return [{"in_flight": IN_FLIGHT[name] if row.get("interleaved") else 1, **row} for row in rows.values()]


def run_of(row: dict[str, Any]) -> RunConfig:
    return RunConfig.load(
        {"dtype": row["dtype"]}, batch_size=row["batch"], max_length=row["length"], micro_batch_size=row["micro_batch"],
        interleave="on" if row["in_flight"] > 1 else "off", in_flight=max(2, row["in_flight"]),
        **{name: row[name] for name in DEGREES},
    )  # fmt: skip


def forward_row(**more: Any) -> dict[str, Any]:
    """A row as ``bench.py`` records it."""
    return {
        "layout": "single", "gpus": 1, "mode": "full", "fusion": "auto", "batch": 8, "length": 10000, "tps": 1000.0,
        "mfu": 0.5, "step_ms": 80.0, "step_spread": 0.01, "peak_memory_gib": 7.25, "device": "a GPU",
    } | more  # fmt: skip
