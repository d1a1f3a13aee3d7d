"""Recorded steps of our layouts, as the planner is asked about them.

Which of them constants are fitted on is one rule (``is_fitted_on``), the same for all records. All others are held out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from ds_ring.config import RunConfig
from ds_ring.hf.dims import model_dims
from ds_ring.hf.flops import linear_parameters
from ds_ring.model_dims import ModelDims
from ds_ring.planning.cards import CARDS, Card
from ds_ring.process.launcher import ROOT
from ds_ring.utils.model_config import read_config
from ds_ring.utils.results import read_json

RESULTS = ROOT / "benchmarks/results"
LEFT_OUT = {
    "cpu4.json": "CPUs: of their predictions only the order means anything",
    "gpu2_h200_first.json": "before fused layers and copy engines",
    "gpu2_pass_kv.json": "before fused layers and copy engines",
    "gpu2_stock_attention.json": "before fused layers and copy engines",
    "peers_llama_wide_threads.json": "micro-batches in flight were threads that planned every shape anew",
    "ring2_as_ready.json": "a way of beginning transfers that was given up",
    "single_h100_stock.json": "without fused layers",
    "trace_ring2_own_copies.json": "a way of copying keys within a GPU that was given up",
}
"""Records of steps that today's code would not make, and why."""
IN_FLIGHT = {"gpu2.json": 16, "gpu2_full.json": 16, "ring2_together.json": 16}
"""Micro-batches in flight where sequences are shared, by record, where neither its rows nor the default say so."""
DEGREES = {"dp": "dp_size", "pp": "pp_size", "tp": "tp_size", "ring": "ring_degree", "ulysses": "ulysses_degree"}


@dataclass(frozen=True)
class Case:
    """One layout, size of micro-batch and length of one record; ``step_s`` is the median where it was timed often."""

    record: str
    model: str
    card: str
    config: RunConfig
    gpus: int
    step_s: float

    @property
    def layout(self) -> str:
        return self.config.topology.label()

    @property
    def together(self) -> tuple[str, str, int, int]:
        """What is equal of layouts that compare with one another."""
        work = self.config.workload
        return self.record, self.model, work.batch_size, work.max_length

    @property
    def is_fitted_on(self) -> bool:
        """Two GPUs, the paper's model, 10,000 tokens a sequence."""
        return self.gpus == 2 and self.model == "paper" and self.config.workload.max_length == 10_000

    def dims(self) -> ModelDims:
        return model_of(self.model)[0]

    def parameters(self) -> int:
        return model_of(self.model)[1]

    def card_of(self) -> Card:
        return CARDS[self.card]


@cache
def model_of(name: str) -> tuple[ModelDims, int]:
    config = read_config(ROOT / f"ds_configs/models/{name}.json")
    return model_dims(config), linear_parameters(config)


@cache
def cases() -> tuple[Case, ...]:
    """All of them, in the order of records."""
    found: list[Case] = []
    for file in sorted(RESULTS.glob("*.json")):
        if file.name not in LEFT_OUT:
            steps: dict[tuple[Any, ...], list[float]] = defaultdict(list)
            configs: dict[tuple[Any, ...], Case] = {}
            for case in _cases_of(file):
                work = case.config.workload
                key = case.model, case.layout, work.batch_size, work.micro_batch_size, work.max_length
                steps[key].append(case.step_s)
                configs[key] = case
            found += [
                Case(one.record, one.model, one.card, one.config, one.gpus, median(steps[key]))
                for key, one in configs.items()
            ]
    return tuple(found)


def _cases_of(file: Path) -> Iterator[Case]:
    document = read_json(file)
    parts = ("micro_batches", "sweep", "rows")
    # A row may be in several parts of a comparison: once is enough.
    rows = {id_of(row): row for part in parts for row in _list(document.get(part)) if isinstance(row, dict)}
    model = "llama_wide" if "llama_wide" in str(document.get("command")) + file.name else "paper"
    for row in rows.values():
        if row.get("tree") == "old" or row.get("implementation", "ds_ring") != "ds_ring":
            continue
        if "step_ms" in row and row.get("mode", "full") == "full" and row.get("fusion", "auto") == "auto":
            yield _case(file.name, model, row, row["device"])
        elif row.get("variant") == "ds_ring's fusion":
            single = {"layout": "single", "micro_batch": row["batch"], "step_ms": row["ms"], "gpus": 1}
            yield _case(file.name, row["case"], {**row, **single}, document["device"])
        elif "seconds" in row and row.get("fits"):
            ring = {"layout": document["layout"], "batch": 1, "micro_batch": 1, "step_ms": 1e3 * row["seconds"]}
            yield _case(file.name, model, {**row, **ring, "gpus": document["gpus"]}, row["device"])


def id_of(row: dict[str, Any]) -> str:
    names = ("tree", "round", "case", "variant", "layout", "implementation", "mode", "batch", "micro_batch", "length")
    return repr([row.get(name) for name in names])


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _case(record: str, model: str, row: dict[str, Any], device: str) -> Case:
    card = next(name for name in CARDS if name in device)
    degrees = {DEGREES[axis]: int(size) for axis, size in re.findall(r"(dp|pp|tp|ring|ulysses)(\d+)", row["layout"])}
    shared = row.get("interleaved", False)
    lanes = row.get("in_flight") or ((IN_FLIGHT.get(record, 2) if "tp" not in row["layout"] else 2) if shared else 1)
    config = RunConfig.load(
        {"dtype": row.get("dtype", "fp16")}, batch_size=row["batch"], micro_batch_size=row["micro_batch"],
        max_length=row["length"], interleave="on" if lanes > 1 else "off", in_flight=max(2, lanes), **degrees,
    )  # fmt: skip
    return Case(record, model, card, config, row["gpus"], 1e-3 * row["step_ms"])
