"""Baselines, other projects' sequence parallelism: what they cannot do, and that they compute the model."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks.baselines import rules
from benchmarks.baselines.load import init_inference
from benchmarks.baselines.rules import check_device, check_installed
from ds_ring import api
from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError, UnsupportedModelError
from ds_ring.hf.dims import model_dims, read_config
from tests.helpers.launching import ROOT, agree_on_two_gpus, deepspeed, last_line, run, wide_head_llama
from tests.helpers.shapes import SHAPE, check
from tests.helpers.tiny_models import build, llama_mqa

ULYSSES = {"implementation": "deepspeed_ulysses", "ulysses_degree": 2}
RING = {"implementation": "context_parallel", "ring_degree": 2}
YUNCHANG = {"implementation": "yunchang", "ulysses_degree": 2, "ring_degree": 2}
FILES = ("baselines2/deepspeed_ulysses2.json", "baselines2/context_parallel2.json")


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


@pytest.mark.launch
def test_deepspeeds_ulysses_is_compared_in_the_same_table(tmp_path):
    """Odd lengths, a last micro-batch of another size, and sizes swept."""
    file, output = tmp_path / "baseline.json", tmp_path / "compare.json"
    section = {
        "model": str(wide_head_llama(tmp_path / "llama")),
        "parallel": {"ulysses_degree": ULYSSES["ulysses_degree"]},
        "workload": {"batch_size": 3, "max_length": 101, "micro_batch_size": 1},
        "benchmark": {"implementation": ULYSSES["implementation"], "micro_batch_sizes": [1, 2], "repeats": 1},
    }
    file.write_text(json.dumps({"dtype": "fp32", "ds_ring": section}))
    run([sys.executable, "launch/compare.py", "--layouts", str(file), "--output", str(output)])
    document = json.loads(output.read_text())
    (best,), rows = document["rows"], document["micro_batches"]
    assert [row["micro_batch"] for row in rows] == [1, 2]
    assert best["micro_batches"] == [1, 2]
    for row in rows:
        assert (row["layout"], row["implementation"], row["fusion"]) == (
            "deepspeed_ulysses2",
            ULYSSES["implementation"],
            "none",
        )
        assert row["agrees"]
        assert row["max_rel_error"] < 1e-5
        assert row["bytes_formula"] is None
    heads, kv_heads, head_dim, layers, local = 4, 2, 16, 2, 51
    exchanged = 3 * layers * local * (2 * heads + 2 * kv_heads) * head_dim * 4 // 2
    positions = 3 * layers * local * 8
    assert rows[0]["bytes_sent_per_rank"] == exchanged + positions
    assert "deepspeed_ulysses2" in output.with_suffix(".md").read_text()


@pytest.mark.launch
def test_context_parallel_computes_the_model(tmp_path):
    """PyTorch's ring, with its kernel for CPUs in place of those for GPUs, the only ones that it takes."""
    script = tmp_path / "ring.py"
    script.write_text(f"""
import json, sys, torch
from tests.helpers.tiny_models import build, llama_gqa, logits, tokens
from torch.distributed.tensor import DTensor
from benchmarks.baselines.load import baseline_of
from benchmarks.communication.engines import muted
from benchmarks.layouts import bench
from ds_ring import api
from ds_ring.engine.connect import connect
from ds_ring.cli.options import leave
from ds_ring.config import RunConfig
from benchmarks.baselines import context_parallel
from ds_ring.hf.dims import model_dims

kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

def ring(op, args, options):
    q, k, v = (t.to_local() for t in args[:3])
    group, scale = args[0].device_mesh.get_group(), options["scale"]
    found = context_parallel._ring._templated_ring_attention(group, 2, kernel, q, k, v, is_causal=args[4], scale=scale)
    return tuple(DTensor.from_local(t, args[0].device_mesh, args[0].placements, run_check=False) for t in found)

context_parallel._ring.custom_ops[kernel] = ring
model = build(llama_gqa())
ids = tokens(3, 101)
want, mesh, found = logits(model, ids), None, []
for options in ({{}}, {{"ring_impl": "contiguous", "ring_variant": "pass_kv"}}):
    run = RunConfig.load({{"dtype": "fp32"}}, micro_batch_size=2, **{RING}, **options)
    mesh = mesh or connect(run)
    engine = api.build_engine(model, run, mesh, model_dims(model.config), torch.device("cpu"), baseline_of(run))
    got = engine(ids).logits
    error = float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())
    batch, _ = bench.pack(ids, None, None, engine.runner.dims)
    sent, journal = bench.count_bytes(engine, lambda: engine.prefill(batch, "last"))
    for again in journal:
        again()
    with muted(engine):
        alone = float((engine(ids).logits - want).norm())
    found.append({{"error": error, "sent": sent, "muted": alone, "local": len(engine.runner.held_positions(101, 0))}})
if mesh.rank == 0:
    print(json.dumps(found), flush=True)
leave(0)
""")
    zigzag, contiguous = last_line(deepspeed(2, script))
    for found in (zigzag, contiguous):
        assert found["error"] < 1e-5
        assert found["muted"] > 1  # without the others' keys it is another computation
        layers, kv_heads, head_dim = 3, 3, 8
        assert found["sent"] == 3 * layers * found["local"] * 2 * kv_heads * head_dim * 4
    assert (zigzag["local"], contiguous["local"]) == (64, 64)


@pytest.mark.gpu
@pytest.mark.launch
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs; run make test-gpu where there are")
@pytest.mark.parametrize("head_dim", [64, 512])
def test_baselines_agree_on_two_gpus(head_dim, tmp_path):
    agree_on_two_gpus(FILES, head_dim, tmp_path)
