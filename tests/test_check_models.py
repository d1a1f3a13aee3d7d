"""The table of architectures: one that works, one that is refused, one that transformers makes no small model of."""

import os
import subprocess
import sys

import pytest
import torch
from test_launch import ROOT, last_line, run

from ds_ring.check_models import SIZES, architectures, tiny_config
from ds_ring.launcher import free_port

SCRIPT = [sys.executable, "launch/check_models.py"]


@pytest.mark.launch
def test_outcomes_and_their_table(tmp_path):
    table = tmp_path / "models.md"
    done = run([*SCRIPT, "--types", "gemma2", "bloom", "xlnet", "--markdown", str(table)])
    rows = {row["model_type"]: row for row in last_line(done)["rows"]}
    assert rows["gemma2"]["outcome"] == "works"
    assert rows["gemma2"]["same_tokens"] == 64
    assert 0 < rows["gemma2"]["max_rel_error"] < 1e-5
    assert rows["bloom"]["outcome"] == "refused"
    assert "does not go through transformers' attention interface" in rows["bloom"]["detail"]
    assert rows["xlnet"]["outcome"] == "not tried"
    text = table.read_text()
    assert "## works: 1" in text
    assert "| gemma2 | Gemma2ForCausalLM |" in text
    assert "| bloom | BloomForCausalLM | BloomForCausalLM does not go" in text


def test_small_configs_keep_one_layer_of_each_kind():
    assert {"llama", "gpt2", "gpt_oss", "qwen3"} <= set(architectures())
    config = tiny_config("gpt_oss")
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert (config.num_hidden_layers, config.hidden_size, config.sliding_window) == (2, 48, SIZES["sliding_window"])
    assert tiny_config("llama").num_hidden_layers == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU; run make test-gpu on a machine with one")
def test_tokens_of_a_gpu_are_those_of_a_cpu():
    types = ["llama", "gemma2", "gpt_oss", "mistral", "gpt2"]
    command = ["deepspeed", "--quiet", "--no_local_rank", "--master_port", str(free_port()), "--num_gpus", "1"]
    done = subprocess.run(
        [*command, *SCRIPT[1:], "--types", *types], cwd=ROOT, capture_output=True, text=True, timeout=540,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert [row["outcome"] for row in last_line(done)["rows"]] == ["works"] * len(types)
