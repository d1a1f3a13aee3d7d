"""The check of architectures: one that works, one that is refused, one without a small model; and its page."""

import os
import subprocess
import sys

import pytest

from benchmarks.models import models_page
from benchmarks.models.tiny_models import SIZES, architectures, tiny_config
from ds_ring.errors import InputError
from ds_ring.process.launcher import free_port
from tests.helpers.launching import ROOT, last_line, run
from tests.helpers.marks import NEEDS_A_GPU
from tests.helpers.pages import tables

SCRIPT = [sys.executable, "launch/check_models.py"]


@pytest.mark.launch
def test_outcomes_and_their_table(tmp_path):
    table, output = tmp_path / "models.md", tmp_path / "models.json"
    types = ["gemma2", "bloom", "xlnet"]
    done = run([*SCRIPT, "--types", *types, "--new-tokens", "32", "--output", str(output)])
    rows = {row["model_type"]: row for row in last_line(done)["rows"]}
    run([*SCRIPT, "--table", str(output), "--markdown", str(table)])
    assert rows["gemma2"]["outcome"] == "works"
    assert rows["gemma2"]["same_tokens"] == 32
    assert 0 < rows["gemma2"]["max_rel_error"] < 1e-5
    assert rows["bloom"]["outcome"] == "refused"
    assert "does not go through transformers' attention interface" in rows["bloom"]["detail"]
    assert rows["xlnet"]["outcome"] == "not tried"
    works, refused, not_tried = tables(table.read_text())
    assert [(row["type"], row["class"]) for row in works] == [("gemma2", "Gemma2ForCausalLM")]
    assert refused[0]["type"] == "bloom"
    assert refused[0]["why"].startswith("BloomForCausalLM does not go")
    assert not_tried[0]["type"] == "xlnet"


def document(layout, **outcomes):
    errors = {"works": {"max_rel_error": 1e-6}, "differs": {"max_rel_error": 0.5}}
    rows = [
        {"model_type": name, "class": name.upper(), "outcome": outcome, "detail": detail, **errors.get(outcome, {})}
        for name, (outcome, detail) in outcomes.items()
    ]
    general = {
        "length": 75,
        "new_tokens": 64,
        "versions": {"torch": "1"},
        "command": "check",
        "git": "abc",
        "date": "2001",
    }
    return {"layout": layout, "rows": rows, **general}


def test_a_table_of_several_layouts():
    ring = document("ring2", a=("works", ""), b=("works", ""), c=("refused", "no | way"), d=("works", ""))
    shared = document(
        "tp2_pp2", a=("works", "a tie"), b=("refused", "it is fused"), c=("refused", "no"), d=("differs", "token 3")
    )
    text = models_page.text([ring, shared])
    works, works_in_some, refused, differs = tables(text)
    assert works == [{"type": "a", "class": "A", "max error": "1.0e-06 tp2_pp2: a tie"}]
    assert works_in_some == [{"type": "b", "class": "B", "why": "ring2. tp2_pp2: it is fused"}]
    assert refused == [{"type": "c", "class": "C", "why": "no \\| way"}]
    assert differs == [{"type": "d", "class": "D", "max error": "5.0e-01 tp2_pp2: token 3"}]
    assert "## works: 1" in text.splitlines()
    with pytest.raises(InputError, match="tp2_pp2 and ring2 differ in new_tokens"):
        models_page.text([ring, shared | {"new_tokens": 1}])


def test_small_configs_keep_one_layer_of_each_kind():
    assert {"llama", "gpt2", "gpt_oss", "qwen3"} <= set(architectures())
    config = tiny_config("gpt_oss")
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert (config.num_hidden_layers, config.hidden_size, config.sliding_window) == (2, 48, SIZES["sliding_window"])
    assert tiny_config("llama").num_hidden_layers == 2


@pytest.mark.gpu
@NEEDS_A_GPU
def test_tokens_of_a_gpu_are_those_of_a_cpu():
    types = ["llama", "gemma2", "gpt_oss", "mistral", "gpt2"]
    command = ["deepspeed", "--quiet", "--no_local_rank", "--master_port", str(free_port()), "--num_gpus", "1"]
    done = subprocess.run(
        [*command, *SCRIPT[1:], "--types", *types], cwd=ROOT, capture_output=True, text=True, timeout=540,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert [row["outcome"] for row in last_line(done)["rows"]] == ["works"] * len(types)
