"""Layers as they are, fused and compiled: that all compute the same, what Dynamo compiles, and the table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.kernels import layer_fusion
from ds_ring.engine.batch import Batch
from ds_ring.process.launcher import ROOT
from tests.helpers.launching import last_line, run

TINY = {"hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64}
CASES = {"paper": TINY, "llama_wide": TINY | {"num_key_value_heads": 2, "head_dim": 8}}
LENGTHS = [16, 12, 8]
COMPILED = f"{layer_fusion.COMPILED}, default"
VARIANTS = [layer_fusion.STOCK, layer_fusion.FUSED, COMPILED]


def tiny(directory: Path, name: str) -> Path:
    config = json.loads((ROOT / f"ds_configs/models/{name}.json").read_text()) | CASES[name]
    (file := directory / f"{name}.json").write_text(json.dumps(config))
    return file


def test_variants_agree_and_a_layer_is_one_graph(tmp_path):
    cases = [word for name in CASES for word in ("--case", tiny(tmp_path, name), 2, LENGTHS[0])]
    options = ["--dtype", "fp32", "--seconds", 0.02, "--rounds", 2, "--backend", "aot_eager"]
    command = [sys.executable, "launch/bench_layer_fusion.py", *cases, *options, "--output", tmp_path / "found.json"]
    found = last_line(run([str(word) for word in command]))
    assert found == json.loads((tmp_path / "found.json").read_text())
    want = [(case, length, variant) for case in CASES for length in LENGTHS for variant in VARIANTS]
    assert [(row["case"], row["length"], row["variant"]) for row in found["rows"]] == want
    for row in found["rows"]:
        assert row["rel_error"] < 1e-5
        assert row["passes"] >= 2
        assert row["tps"] * row["ms"] == pytest.approx(2 * row["length"] * 1e3)
        assert row["over_fusion"] == 1 or row["variant"] != layer_fusion.FUSED
        assert ("2 x AddNorm" in row["fused"]) == (row["variant"] == layer_fusion.FUSED)
        # All layers share the first one's graph; a second length makes a dynamic one, which a third takes.
        graphs = row["variant"] == COMPILED and row["length"] != LENGTHS[2]
        assert row["graphs_of_first_layer"] == row["graphs_of_all_layers"] == graphs
        assert row["recompiles"] == (graphs and row["length"] != LENGTHS[0])
        assert row["graph_breaks"] == 0


def test_a_variant_that_fails_is_a_row(tmp_path, monkeypatch):
    layer = nn.Identity()

    def prefill(batch: Batch, *_: Any, **__: Any) -> list[Any]:
        return [SimpleNamespace(hidden_BTd=layer(torch.ones(*batch.ids_BL.shape, 8)))]

    def build(variant: Any, *_: Any) -> None:
        if variant.name == layer_fusion.FUSED:
            raise RuntimeError("does not build")
        fails = variant.name == COMPILED
        runner = SimpleNamespace(decoder=SimpleNamespace(layers=[layer]), fusion=None, peak_memory_gib=0.0)
        variant.engine = SimpleNamespace(prefill=fail if fails else prefill, runner=runner)

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("does not fit")

    monkeypatch.setattr(layer_fusion._Variant, "build", build)
    case, effort = layer_fusion.Case(str(tiny(tmp_path, "paper")), 1, 4), layer_fusion.Effort(0.01, 1, "inductor")
    cpu, say = torch.device("cpu"), lambda _: None
    rows = list(layer_fusion.run([case], ["default"], torch.float32, cpu, effort, say))
    assert [row.get("error") for row in rows[:3]] == [
        None, "RuntimeError: does not build", "OutOfMemoryError: does not fit"
    ]  # fmt: skip
    assert rows[0]["tps"] > 0
    assert rows[0]["over_fusion"] is None
    assert len(rows) == 3 * 3
