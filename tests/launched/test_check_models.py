"""The check of architectures: one that works, one that is refused, one without a small model."""

import sys

import pytest

from tests.helpers.launching import last_line, run
from tests.helpers.pages import tables

pytestmark = pytest.mark.launch

SCRIPT = [sys.executable, "launch/check_models.py"]


def test_outcomes_and_their_table(tmp_path):
    table, output = tmp_path / "models.md", tmp_path / "models.json"
    types = ["gemma2", "bloom", "xlnet"]
    done = run([*SCRIPT, "--types", *types, "--new-tokens", "32", "--output", str(output)])
    found = last_line(done)["rows"]
    rows = {row["model_type"]: row for row in found if "rope" not in row}
    assert [(row["rope"], row["outcome"]) for row in found if "rope" in row] == [
        ("longrope", "works"), ("dynamic", "works"),
    ]  # fmt: skip
    run([*SCRIPT, "--table", str(output), "--markdown", str(table)])
    assert rows["gemma2"]["outcome"] == "works"
    assert rows["gemma2"]["same_tokens"] == 32
    assert 0 < rows["gemma2"]["max_rel_error"] < 1e-5
    assert rows["bloom"]["outcome"] == "refused"
    assert "does not go through transformers' attention interface" in rows["bloom"]["detail"]
    assert rows["xlnet"]["outcome"] == "not tried"
    works, refused, not_tried = tables(table.read_text())
    assert [row["type"] for row in works] == ["gemma2", "gemma2 (longrope)", "gemma2 (dynamic)"]
    assert refused[0]["type"] == "bloom"
    assert refused[0]["why"].startswith("BloomForCausalLM does not go")
    assert not_tried[0]["type"] == "xlnet"
