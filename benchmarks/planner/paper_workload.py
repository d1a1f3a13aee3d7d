"""The paper's workload on the two machines that its text may mean: 16 H100s in two hosts, or in one NVLink domain."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.planner.cases import model_of
from ds_ring.config import RunConfig
from ds_ring.planning.cards import CARDS, Card
from ds_ring.planning.explain import row, used
from ds_ring.planning.plan import plans

RANKS = 16
MACHINES = {"two hosts of 8, 400 Gbit/s a GPU": 8, "one NVLink domain of 16": 16}
"""GPUs that NVLink connects."""
SHOWN = ("dp16", "ulysses16", "ulysses8_ring2", "ring16", "tp8_pp2")


def workload(micro_batch_size: int = 4) -> RunConfig:
    """1,024 sequences of 10,000 tokens; micro-batches as in ds_configs/paper_*.json."""
    options = {"batch_size": 1024, "max_length": 10_000, "micro_batch_size": micro_batch_size}
    return RunConfig.load({"dtype": "fp16"}, **options)


def card_of(machine: str) -> Card:
    return replace(CARDS["H100"], per_host=MACHINES[machine])


def planned(machine: str) -> dict[str, dict[str, Any]]:
    """Every layout of a machine by its label, fastest first."""
    dims, parameters = model_of("paper")
    ordered = plans(workload(), dims, parameters, RANKS, card_of(machine))
    return {plan.label: row(plan, ordered, dims, card_of(machine)) for plan in ordered}


def paper_rows() -> list[dict[str, Any]]:
    """The layouts of ``SHOWN`` on each machine."""
    return [
        {"machine": machine, **{name: rows[label][name] for name in ("layout", "tps", "sum", "stays_gb", "leaves_gb")}}
        for machine in MACHINES
        for rows in [planned(machine)]
        for label in rows
        if label in SHOWN
    ]


def assumed() -> list[str]:
    """What these predictions rest on that no record has."""
    return used(
        [rows[label] for machine in MACHINES for rows in [planned(machine)] for label in SHOWN if label in rows]
    )
