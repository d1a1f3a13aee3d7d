"""The closed form of a rank's memory, held against what GPUs recorded."""

from __future__ import annotations

from typing import Any

import pytest

from ds_ring.config import RunConfig
from ds_ring.hf.dims import model_dims
from ds_ring.hf.flops import linear_parameters
from ds_ring.planning.memory_estimate import peak_bytes
from ds_ring.process.launcher import ROOT
from ds_ring.utils.model_config import read_config
from tests.helpers.recorded_rows import rows_of, run_of

PAPER = read_config(ROOT / "ds_configs/models/paper.json")
RECORDS = ("gpu2", "gpu2_two_in_flight", "peers_gpu2", "latency_gpu2", "trace_tp2", "gpu4")


def with_the_most_in_flight(name: str) -> list[dict[str, Any]]:
    """When these were recorded, slots that more micro-batches had left were held beside those of fewer."""
    rows = rows_of(name)
    most = {row["layout"]: max(r["in_flight"] for r in rows if r["layout"] == row["layout"]) for row in rows}
    return [row for row in rows if row["in_flight"] == most[row["layout"]]]


@pytest.mark.parametrize(
    "row", [row for name in RECORDS for row in with_the_most_in_flight(name)], ids=lambda row: row["layout"]
)
def test_it_is_within_a_tenth_of_every_record(row):
    micro = min(row["micro_batch"], row["batch"])
    predicted = peak_bytes(run_of(row), model_dims(PAPER), linear_parameters(PAPER), micro) / 2**30
    assert predicted == pytest.approx(row["peak_memory_gib"], rel=0.1)


def test_a_second_micro_batch_in_flight_is_counted_where_there_is_one():
    def gib(batch: int, **options: Any) -> float:
        run = RunConfig.load({"dtype": "fp16"}, batch_size=batch, max_length=10_000, ring_degree=2, **options)
        return peak_bytes(run, model_dims(PAPER), linear_parameters(PAPER), 1) / 2**30

    assert gib(2) > gib(1) + 0.4
    assert gib(2, interleave="off") == gib(2, transport="process_group") == gib(1)
    assert gib(3) == gib(2, in_flight=8) == gib(2)
    assert gib(8, in_flight=8) - gib(8) > 5 * (gib(2) - gib(1))
