"""The planner held against what GPUs recorded: its steps, and what its first choice costs."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from ds_ring.config import RunConfig
from ds_ring.hardware import CARDS
from ds_ring.hf.flops import linear_parameters
from ds_ring.hf.shape import model_shape, read_config
from ds_ring.launcher import ROOT
from ds_ring.plan import Plan, _predict

RECORDS = {
    "gpu2": "paper", "gpu4": "paper", "gpu2_short": "paper", "gpu2_lengths": "paper", "latency_gpu2": "paper",
    "latency_gpu4": "paper", "peers_llama_wide_gpu2": "llama_wide",
}  # fmt: skip
DEGREES = ("dp_size", "pp_size", "tp_size", "ring_degree", "ulysses_degree")

Case = tuple[str, int, int]
"""A record, a length and a size of micro-batch."""


def measured() -> dict[Case, list[dict[str, Any]]]:
    """Our full passes, one of a layout."""
    found: dict[Case, list[dict[str, Any]]] = defaultdict(list)
    for name in RECORDS:
        document = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
        rows = {
            (row["layout"], row["length"], row["micro_batch"]): row
            for part in ("micro_batches", "sweep", "rows")
            for row in document.get(part, [])
        }
        for row in rows.values():
            if row["implementation"] == "ds_ring" and row["mode"] == "full":
                found[name, row["length"], row["micro_batch"]].append(row)
    return found


def predicted(name: str, row: dict[str, Any]) -> Plan:
    config = read_config(Path(ROOT / f"ds_configs/models/{RECORDS[name]}.json"))
    lanes = row.get("in_flight", 16 if name == "gpu2" else 2)
    by_itself = row["tp_size"] == 1 or row["pp_size"] > 1 or lanes == 1
    run = RunConfig.load(
        {"dtype": row["dtype"]}, batch_size=row["batch"], max_length=row["length"], micro_batch_size=row["micro_batch"],
        in_flight=max(2, lanes), interleave="auto" if by_itself else "on", **{name: row[name] for name in DEGREES},
    )  # fmt: skip
    card = next(card for key, card in CARDS.items() if key in row["device"])
    return _predict(run, model_shape(config), linear_parameters(config), card)


@pytest.mark.parametrize(("case", "rows"), measured().items(), ids=lambda value: str(value)[:40])
def test_predicted_steps_are_near_the_measured_ones(case, rows):
    """Within an eighth: GPUs that take turns run at a higher clock than the card's."""
    for row in rows:
        step = predicted(case[0], row).step_s
        assert step == pytest.approx(1e-3 * row["step_ms"], rel=0.125), row["layout"]


@pytest.mark.parametrize(("case", "rows"), measured().items(), ids=lambda value: str(value)[:40])
def test_the_first_choice_is_the_fastest_or_hardly_slower(case, rows):
    first = min(rows, key=lambda row: predicted(case[0], row).step_s)
    assert first["step_ms"] <= 1.015 * min(row["step_ms"] for row in rows), first["layout"]
