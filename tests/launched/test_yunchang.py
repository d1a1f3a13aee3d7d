"""yunchang beside ours. It need not be installed, so none of this runs where it is not."""

from importlib.util import find_spec

import pytest

from tests.helpers.launching import deepspeed, last_line

pytestmark = [
    pytest.mark.launch,
    pytest.mark.skipif(find_spec("yunchang") is None, reason="yunchang is not installed; pip install yunchang"),
]


def test_it_computes_the_model(tmp_path):
    """Four ranks, with PyTorch's kernel for CPUs in place of those for GPUs, and with their restrictions."""
    script = tmp_path / "baseline.py"
    script.write_text("""
import json, sys, torch
from tests.helpers.tiny_models import build, gpt_neox, llama_gqa, logits, tokens
from torch.nn.functional import pad
from yunchang.kernels import attention as kernels
from benchmarks.baselines.load import baseline_of
from benchmarks.communication.engines import muted
from benchmarks.layouts import bench
from ds_ring import api
from ds_ring.engine.connect import connect
from ds_ring.cli.options import leave
from ds_ring.config import RunConfig
from ds_ring.hf.dims import model_dims

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

def memory_efficient(q, k, v, attn_bias, compute_log_sumexp, **options):
    assert q.shape[1] == k.shape[1]
    out, lse = flash(q, k, v, **options)
    return out, pad(lse, (0, -lse.shape[2] % 32))

kernels._scaled_dot_product_flash_attention = flash
kernels._scaled_dot_product_efficient_attention = memory_efficient

def merged(engine):
    '''Relative errors on this rank in fp16: of its ring, and of the kernel alone.'''
    generator, length = torch.Generator().manual_seed(0), 1024
    q, k, v = (torch.randn(1, 2, length, 64, generator=generator).half() for _ in range(3))
    at_T = engine.runner.held_positions(length, engine.mesh["sp"].rank)
    local = (t[:, :, at_T].transpose(1, 2) for t in (q, k, v))
    ring = engine.runner._attention(*local, causal=True).transpose(1, 2)
    want = flash(q.double(), k.double(), v.double(), is_causal=True)[0][:, :, at_T]
    alone = flash(q, k, v, is_causal=True)[0][:, :, at_T]
    return [float((got - want).norm() / want.norm()) for got in (ring, alone)]

llama, neox = llama_gqa(hidden_size=32, num_attention_heads=4, num_key_value_heads=2), gpt_neox(heads=2, layers=3)
ids, found = tokens(3, 101), []
for config, dtype, options in (
    (llama, "fp32", {"ulysses_degree": 2, "ring_degree": 2}),
    (neox, "fp32", {"ulysses_degree": 2, "ring_degree": 2, "ring_impl": "contiguous"}),
    (neox, "fp32", {"ulysses_degree": 2, "dp_size": 2}),
    (llama, "fp16", {"ring_degree": 4}),
):
    run = RunConfig.load({"dtype": dtype}, implementation="yunchang", batch_size=3, micro_batch_size=2, **options)
    mesh = connect(run)
    model = build(config)
    want = logits(model, ids)
    engine = api.build_engine(model, run, mesh, model_dims(model.config), torch.device("cpu"), baseline_of(run))
    got = engine(ids).logits.float()
    error = float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())
    batch, _ = bench.pack(ids, None, None, engine.runner.dims)
    sent, journal = bench.count_bytes(engine, lambda: engine.prefill(batch, "last"))
    for again in journal:
        again()
    found.append({"error": error, "sent": sent, "local": len(engine.runner.held_positions(101, 0))})
    if dtype == "fp16":
        errors = mesh["world"].all_gather_objects(merged(engine))
        found[-1]["ring"], found[-1]["alone"] = (max(e) for e in zip(*errors))
    with muted(engine):
        found[-1]["muted"] = float((engine(ids).logits - want).norm())
    assert torch.distributed.batch_isend_irecv.__module__.startswith("torch.")
if mesh.rank == 0:
    print(json.dumps(found), flush=True)
leave(0)
""")
    found = last_line(deepspeed(4, script))
    both, contiguous, ulysses, ring = found
    for each in found:
        assert each["error"] < (2e-2 if each is ring else 1e-5)
        assert each["muted"] > 1  # without the others' tokens it is another computation
    layers, head_dim, rows = 3, 8, 3
    heads = 4  # as many as a query has, of keys and values too: the memory-efficient kernel takes no fewer
    exchanged, passed_on = 4 * heads * both["local"] // 2, 2 * heads // 2 * 2 * both["local"]
    assert both["sent"] == rows * layers * (exchanged + passed_on) * head_dim * 4
    assert contiguous["sent"] == both["sent"] / 2  # half as many heads
    assert ulysses["sent"] == rows / 2 * layers * 4 * 2 * ulysses["local"] // 2 * head_dim * 4
    assert ring["sent"] == rows * layers * 3 * 2 * 2 * ring["local"] * head_dim * 2  # the two heads that they are
    assert 2 * ring["alone"] < ring["ring"] < 5e-3  # what merging in fp16 costs
