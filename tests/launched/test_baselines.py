"""Baselines, other projects' sequence parallelism, in real processes: they compute the model, and share our table."""

import json
import sys

import pytest

from tests.helpers.launching import deepspeed, last_line, run, save_llama
from tests.helpers.rope_models import longrope

pytestmark = pytest.mark.launch

RING = {"implementation": "context_parallel", "ring_degree": 2}


def test_deepspeeds_ulysses_is_compared_in_the_same_table(tmp_path):
    """Odd lengths, a last micro-batch of another size, and sizes swept; rotary frequencies that depend on the length,
    of which a rank has a half."""
    file, output = tmp_path / "baseline.json", tmp_path / "compare.json"
    workload = {"batch_size": 3, "max_length": 101, "micro_batch_size": 1}
    benchmark = {"implementation": "deepspeed_ulysses", "micro_batch_sizes": [1, 2], "repeats": 1}
    section = {"parallel": {"ulysses_degree": 2}, "workload": workload, "benchmark": benchmark}
    llama = save_llama(tmp_path / "llama", rope_parameters=longrope(head_dim=16, original_max_position_embeddings=60))
    file.write_text(json.dumps({"dtype": "fp32", "ds_ring": {"model": str(llama), **section}}))
    run([sys.executable, "launch/compare.py", "--layouts", str(file), "--output", str(output)])
    document = json.loads(output.read_text())
    (best,), rows = document["rows"], document["micro_batches"]
    assert [row["micro_batch"] for row in rows] == [1, 2]
    assert best["micro_batches"] == [1, 2]
    for row in rows:
        assert (row["layout"], row["implementation"], row["fusion"]) == (
            "deepspeed_ulysses2",
            "deepspeed_ulysses",
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
