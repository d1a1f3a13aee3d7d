"""The planner held against what GPUs recorded: its steps, and what its first choice costs."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from ds_ring.hf.dims import model_dims, read_config
from ds_ring.hf.flops import linear_parameters
from ds_ring.planning.cards import CARDS
from ds_ring.planning.plan import Plan, _predict
from ds_ring.process.launcher import ROOT
from tests.helpers.recorded_rows import rows_of, run_of

RECORDS = {
    "gpu2": "paper", "gpu4": "paper", "gpu2_short": "paper", "gpu2_lengths": "paper", "latency_gpu2": "paper",
    "latency_gpu4": "paper", "peers_llama_wide_gpu2": "llama_wide",
}  # fmt: skip

Case = tuple[str, int, int]
"""A record, a length and a size of micro-batch."""


def measured() -> dict[Case, list[dict[str, Any]]]:
    """Our full passes, one of a layout."""
    found: dict[Case, list[dict[str, Any]]] = defaultdict(list)
    for name in RECORDS:
        for row in rows_of(name):
            if row["mode"] == "full":
                found[name, row["length"], row["micro_batch"]].append(row)
    return found


def predicted(name: str, row: dict[str, Any]) -> Plan:
    config = read_config(ROOT / f"ds_configs/models/{RECORDS[name]}.json")
    card = next(card for key, card in CARDS.items() if key in row["device"])
    return _predict(run_of(row), model_dims(config), linear_parameters(config), card, generating=False)


@pytest.mark.parametrize(("case", "rows"), measured().items(), ids=lambda value: str(value)[:40])
def test_predicted_steps_are_near_the_measured_ones(case, rows):
    """ViewOf an eighth: GPUs that take turns run at a higher clock than the card's."""
    for row in rows:
        step = predicted(case[0], row).step_s
        assert step == pytest.approx(1e-3 * row["step_ms"], rel=0.125), row["layout"]


@pytest.mark.parametrize(("case", "rows"), measured().items(), ids=lambda value: str(value)[:40])
def test_the_first_choice_is_the_fastest_or_hardly_slower(case, rows):
    first = min(rows, key=lambda row: predicted(case[0], row).step_s)
    assert first["step_ms"] <= 1.015 * min(row["step_ms"] for row in rows), first["layout"]
