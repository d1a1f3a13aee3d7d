"""The longest sequence that fits, found by launches with limited memory."""

import json
import sys

import pytest
from transformers import GPTNeoXConfig

from tests.helpers.launching import ROOT, last_line, run, save

pytestmark = pytest.mark.launch


def test_launched_attempts_find_what_a_limited_memory_holds(tmp_path):
    config = GPTNeoXConfig(
        hidden_size=64, num_attention_heads=8, intermediate_size=4096, num_hidden_layers=1, vocab_size=300,
        max_position_embeddings=1 << 17,
    )  # fmt: skip
    model, output = save(tmp_path / "model", config), tmp_path / "longest.json"
    script = [sys.executable, str(ROOT / "launch/longest.py"), "--model", str(model), "--dtype", "fp32"]
    options = ["--ring-degree", "2", "--max-length", "8192", "--memory-limit", "0.1", "--granularity", "1"]
    done = run([*script, *options, "--output", str(output)])
    document = last_line(done)
    assert document == json.loads(output.read_text())
    found = document["longest"]
    assert [row["fits"] for row in document["rows"]] == [False] * (len(document["rows"]) - 1) + [True]
    assert document["shortest_not_fitting"] == 2 * found["length"]
    assert found["tokens_per_second"] == pytest.approx(found["length"] / found["seconds"])
    assert len(found["peak_memory_gib"]) == 2
