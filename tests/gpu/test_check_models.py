"""The check of every architecture, on a GPU."""

from tests.helpers.launching import deepspeed, last_line
from tests.helpers.marks import ON_A_GPU

pytestmark = ON_A_GPU


def test_tokens_of_a_gpu_are_those_of_a_cpu():
    types = ["llama", "gemma2", "gpt_oss", "mistral", "gpt2"]
    done = deepspeed(1, "launch/check_models.py", "--types", *types, on_gpu=True)
    rows = last_line(done)["rows"]
    assert {row["model_type"] for row in rows} == set(types)
    assert {row["outcome"] for row in rows} == {"works"}
