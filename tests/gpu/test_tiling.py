"""On a GPU: heads written into parts of a tensor by the compiled kernel; a long forward's memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from ds_ring.cli.seeded_checkpoint import byte_tokenizer
from ds_ring.config import RunConfig
from ds_ring.hf.dims import model_dims
from ds_ring.kernels import elementwise
from ds_ring.planning.memory_estimate import peak_bytes
from tests.helpers.marks import ON_A_GPU

pytestmark = ON_A_GPU

ROOT = Path(__file__).resolve().parents[2]
LAYERS, LENGTH = 2, 150_000


@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [512, 128, 80])
def test_heads_are_put_into_parts_of_a_tensor(width, dtype, rotates):
    qkv = torch.randn(2, 333, 4, 3 * width, device="cuda").to(dtype).transpose(1, 2)
    x, memory = qkv[:, 1:, :, width : 2 * width], torch.full((2, 400, 9, width), torch.nan, device="cuda", dtype=dtype)
    angle = torch.rand(1, 333, width // 4, device="cuda")
    cos, sin = (torch.cat((f(angle), f(angle)), -1).to(dtype) for f in (torch.cos, torch.sin))
    elementwise.put(x, memory[:, 7:340, 2:5], (cos, sin) if rotates else None)
    want = (elementwise.rotated(x, cos, sin) if rotates else x).transpose(1, 2)
    assert torch.equal(memory[:, 7:340, 2:5], want)
    assert int(memory.isnan().sum()) == memory.numel() - x.numel()


def peak_gib(folder: Path, *options: object) -> float:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1]
    workload = ["--batch-size", 1, "--max-length", LENGTH, "--repeats", 1, "--dtype", "fp16", *options]
    command = [*launcher, "launch/bench.py", "--model", folder, *workload]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    (row,) = json.loads(done.stdout.strip().splitlines()[-1])["rows"]
    found: float = row["peak_memory_gib"]
    return found


def test_a_long_forward_takes_the_memory_of_the_closed_form(tmp_path):
    """Within a tenth, in tiles; without tiles the MLP's intermediate alone is another 1.1 GiB."""
    config = GPTNeoXConfig(
        hidden_size=2048, num_attention_heads=4, intermediate_size=8192, num_hidden_layers=LAYERS, vocab_size=300,
        use_parallel_residual=False, hidden_act="gelu_pytorch_tanh", max_position_embeddings=LENGTH,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    run = RunConfig.load({"dtype": "fp16"}, batch_size=1, max_length=LENGTH, block_tokens=16_384)
    want = peak_bytes(run, model_dims(config), LAYERS * 12 * 2048**2, 1) / 2**30
    tiled = peak_gib(tmp_path, "--block-tokens", 16_384)
    assert tiled == pytest.approx(want, rel=0.1)
    assert peak_gib(tmp_path, "--block-tokens", 0) > tiled + 1.1
