"""The closed form of a rank's memory, held against what GPUs recorded."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ds_ring.config import RunConfig
from ds_ring.hf.flops import linear_parameters
from ds_ring.hf.shape import model_shape, read_config
from ds_ring.launcher import ROOT
from ds_ring.memory import peak_bytes

PAPER = read_config(ROOT / "ds_configs/models/paper.json")
IN_FLIGHT = {"gpu2": 16, "gpu2_two_in_flight": 2, "latency_gpu2": 2, "trace_tp2": 2, "gpu4": 16}
"""By record, where its rows do not say so themselves."""
DEGREES = ("dp_size", "pp_size", "tp_size", "ring_degree", "ulysses_degree")


def rows_of(name: str) -> list[dict[str, Any]]:
    document = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    rows = document.get("micro_batches") or document["rows"]
    own = [row for row in rows if row["implementation"] == "ds_ring" and row["fusion"] == "auto"]
    return [{"in_flight": IN_FLIGHT[name] if row.get("interleaved") else 1, **row} for row in own]


@pytest.mark.parametrize("row", [row for name in IN_FLIGHT for row in rows_of(name)], ids=lambda row: row["layout"])
def test_it_is_within_a_tenth_of_every_record(row):
    run = RunConfig.load(
        {"dtype": row["dtype"]}, batch_size=row["batch"], max_length=row["length"],
        micro_batch_size=row["micro_batch"], interleave="on" if row["in_flight"] > 1 else "off",
        in_flight=max(2, row["in_flight"]),
        **{name: row[name] for name in DEGREES},
    )  # fmt: skip
    micro = min(row["micro_batch"], row["batch"])
    predicted = peak_bytes(run, model_shape(PAPER), linear_parameters(PAPER), micro) / 2**30
    assert predicted == pytest.approx(row["peak_memory_gib"], rel=0.1)


def test_a_second_micro_batch_in_flight_is_counted_where_there_is_one():
    def gib(batch: int, **options: Any) -> float:
        run = RunConfig.load({"dtype": "fp16"}, batch_size=batch, max_length=10_000, ring_degree=2, **options)
        return peak_bytes(run, model_shape(PAPER), linear_parameters(PAPER), 1) / 2**30

    assert gib(2) > gib(1) + 0.4
    assert gib(2, interleave="off") == gib(2, transport="process_group") == gib(1)
    assert gib(3) == gib(2, in_flight=8) == gib(2)
    assert gib(8, in_flight=8) - gib(8) > 5 * (gib(2) - gib(1))
