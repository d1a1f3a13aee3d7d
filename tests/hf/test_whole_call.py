"""The places in the installed transformers where a model derives something from its whole call, which a rank's call is
not. A release that adds one fails here: docs/architecture.md lists what is known, and ``hf/rope.py`` serves it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.helpers.rope_models import longrope
from tests.helpers.tiny_models import llama_gqa

MODELS = Path(transformers.__file__).parent / "models"
PARAMETERS = {
    "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "partial_rotary_factor": 1.0,
}  # fmt: skip


def causal_lms() -> dict[str, str]:
    """The source of every modeling file with a causal LM, by the name of its folder."""
    sources = {file.parent.name: file.read_text() for file in sorted(MODELS.glob("*/modeling_*.py"))}
    found = {name: source for name, source in sources.items() if "ForCausalLM(" in source}
    assert len(found) > 100
    return found


def test_rotary_modules_that_take_the_highest_position_are_known():
    pattern = re.compile(r"torch\.max\(position_ids\)|\bposition_ids\.(a?max)\(")
    found = {name for name, source in causal_lms().items() if pattern.search(source)}
    # Qwen's multimodal ones measure what images take of the text.
    assert {name for name in found if not re.search("omni|vl|glm4v|ernie4_5_vl", name)} == {"phimoe"}


def test_models_that_drop_their_cache_while_a_text_grows_are_known():
    found = set()
    for name, source in causal_lms().items():
        methods = re.findall(r"def prepare_inputs_for_generation\(.*?(?=\n    def |\nclass |\Z)", source, re.DOTALL)
        if any(re.search(r"\bpast_key_values = None", method) for method in methods):
            found.add(name)
    assert found == {"phi3", "phi4_multimodal", "phimoe"}


@pytest.mark.parametrize("kind", sorted({"default", *ROPE_INIT_FUNCTIONS}))
def test_which_kinds_of_rope_depend_on_the_length(kind):
    """A kind that is new is tried with the parameters of all others."""
    rope = longrope() if kind == "longrope" else {"rope_type": kind, **PARAMETERS}
    config = llama_gqa(rope_parameters=rope, max_position_embeddings=32)
    few, many = torch.arange(20)[None], torch.arange(100)[None]
    (alone, _), (within, _) = (LlamaRotaryEmbedding(config)(torch.zeros(1), positions) for positions in (few, many))
    assert torch.equal(alone, within[:, :20]) != (kind in ("longrope", "dynamic"))
