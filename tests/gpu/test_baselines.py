"""Other implementations of sequence parallelism compute the model on two GPUs, and ours beside them."""

import json
import sys
from importlib.util import find_spec

import pytest
import torch

from tests.helpers.launching import ROOT, run, save_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs; run make test-gpu where there are"),
]
YUNCHANG = pytest.mark.skipif(find_spec("yunchang") is None, reason="yunchang is not installed; pip install yunchang")


@pytest.mark.parametrize("head_dim", [64, 512])
@pytest.mark.parametrize(
    "baselines",
    [
        ("deepspeed_ulysses2", "context_parallel2"),
        pytest.param(("yunchang_ring2", "yunchang_ulysses2"), marks=YUNCHANG),
    ],
    ids="-".join,
)
def test_they_agree_on_two_gpus(baselines, head_dim, tmp_path):
    # Scores of moderate size, as in a trained model: in fp16 larger ones differ by their rounding.
    model = save_llama(tmp_path / "llama", head_dim=head_dim, initializer_range=0.05)
    files = [
        ROOT / "ds_configs" / file for file in ("gpu2/ring2.json", *(f"baselines2/{name}.json" for name in baselines))
    ]
    work = ["--model", model, "--max-length", 1001, "--sweep", 500, "--batch-size", 3]
    output = ["--output", tmp_path / "compare.json"]
    run([sys.executable, "launch/compare.py", "--layouts", *files, *work, *output], on_gpu=True)
    document = json.loads((tmp_path / "compare.json").read_text())
    assert document["failed"] == []
    assert [row["layout"] for row in document["rows"]] == [file.stem for file in files]
    for row in document["sweep"]:
        assert row["agrees"], row["layout"]
        assert row["bytes_sent_per_rank"] > 0
