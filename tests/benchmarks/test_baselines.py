"""Baselines, other projects' sequence parallelism: what they can do, and what they are refused for."""

from dataclasses import replace

import pytest
import torch

from benchmarks.baselines import rules
from benchmarks.baselines.load import init_inference
from benchmarks.baselines.rules import check_device, check_installed
from ds_ring import api
from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError, UnsupportedModelError
from ds_ring.hf.dims import model_dims
from ds_ring.utils.model_config import read_config
from tests.helpers.launching import ROOT
from tests.helpers.shapes import SHAPE, check
from tests.helpers.tiny_models import build, llama_mqa

ULYSSES = {"implementation": "deepspeed_ulysses", "ulysses_degree": 2}
RING = {"implementation": "context_parallel", "ring_degree": 2}
YUNCHANG = {"implementation": "yunchang", "ulysses_degree": 2, "ring_degree": 2}


@pytest.mark.parametrize(
    "options",
    [
        ULYSSES,
        RING,
        YUNCHANG,
        ULYSSES | {"dp_size": 2, "batch_size": 2},
        {"implementation": "yunchang", "ring_degree": 3, "ring_variant": "pass_kv"},
    ],
    ids=str,
)
def test_what_baselines_can_do_is_accepted(options):
    check(**options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"implementation": "deepspeed_ulysses"},
            "deepspeed_ulysses shares sequences by ulysses_degree, and goes with",
        ),
        (ULYSSES | {"ring_degree": 2}, "deepspeed_ulysses shares sequences by ulysses_degree, and goes with dp_size"),
        (RING | {"ulysses_degree": 2}, "context_parallel shares sequences by ring_degree, and goes with dp_size alone"),
        (ULYSSES | {"mode": "both"}, "deepspeed_ulysses has no benchmark.mode=both; try full"),
        (RING | {"transport": "copy_engine"}, "has no transport=copy_engine; try auto or process_group"),
        (RING | {"ring_variant": "pass_q"}, "has no parallel.ring_variant=pass_q; try auto, gather_kv or pass_kv"),
        (RING | {"interleave": "on"}, "has no interleave=on; try auto or off"),
        (RING | {"decode_graph": "on"}, "has no decode_graph=on; try auto or off"),
        (ULYSSES | {"decode": "sliced"}, "has no parallel.decode=sliced; try auto or whole"),
        (ULYSSES | {"ulysses_degree": 7}, "num_kv_heads=4 and ulysses_degree=7 must divide one another"),
        (
            {"implementation": "yunchang"},
            "yunchang shares sequences by ulysses_degree and ring_degree, and goes with dp_size alone beside them",
        ),
        (
            YUNCHANG | {"tp_size": 2, "ulysses_degree": 1, "ring_degree": 1},
            "yunchang shares sequences by ulysses_degree",
        ),
        (YUNCHANG | {"ring_variant": "gather_kv"}, "has no parallel.ring_variant=gather_kv; try auto or pass_kv"),
        (
            YUNCHANG | {"ulysses_degree": 7},
            "num_kv_heads=4 is not divisible by ulysses_degree=7; use ring_degree instead",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_baselines_cannot_do_is_refused(options, text):
    with pytest.raises(ConfigError, match=text):
        rules.check(RunConfig.load(None, **options), SHAPE)


def test_models_whose_attention_they_would_get_wrong_are_refused():
    for lacking, shape in {
        "sliding windows": replace(SHAPE, sliding_window=8),
        "soft-capping": replace(SHAPE, softcap=5.0),
        "sliding windows or soft-capping": replace(SHAPE, sliding_window=8, softcap=5.0),
    }.items():
        for options in (ULYSSES, RING, YUNCHANG):
            with pytest.raises(UnsupportedModelError, match=f"has no {lacking}, which llama asks for"):
                rules.check(RunConfig.load(None, **options), shape)
    rules.check(RunConfig.load(None, **RING), replace(SHAPE, sliding_window=8, layer_types=("full_attention",)))


def test_what_needs_gpus_is_refused_on_cpus(monkeypatch):
    for options, text in ((RING, "PyTorch has it for GPUs alone"), (YUNCHANG, "its kernels are for GPUs alone")):
        with pytest.raises(ConfigError, match=text):
            check_device(RunConfig.load({}, **options), "cpu")
        check_device(RunConfig.load({}, **options), "cuda")
    check_device(RunConfig.load({}, **ULYSSES), "cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="PyTorch has it for GPUs alone"):
        init_inference(build(llama_mqa()), **RING)


def test_a_baseline_that_is_not_installed_is_refused_and_said_how_to_get(monkeypatch):
    monkeypatch.setattr(rules, "find_spec", lambda name: None)
    monkeypatch.setattr(api, "local_device", lambda: torch.device("cuda"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="yunchang: it is not installed; pip install yunchang"):
        init_inference(build(llama_mqa()), **YUNCHANG | {"ulysses_degree": 1})
    check_installed(RunConfig.load({}, **RING))


def test_a_name_says_over_which_ranks_where_that_is_a_choice():
    for options, label in (
        (RING, "context_parallel2"),
        (ULYSSES | {"dp_size": 2}, "dp2_deepspeed_ulysses2"),
        (YUNCHANG, "yunchang_ulysses2_ring2"),
        (YUNCHANG | {"ulysses_degree": 1, "dp_size": 3}, "dp3_yunchang_ring2"),
    ):
        assert RunConfig.load({}, **options).label == label


def test_the_wide_llama_is_llama_3_8bs_in_width():
    dims = model_dims(read_config(ROOT / "ds_configs/models/llama_wide.json"))
    assert (dims.hidden_size, dims.intermediate_size, dims.num_layers) == (4096, 14336, 4)
    assert (dims.num_heads, dims.num_kv_heads, dims.head_dim) == (32, 8, 128)
