"""Tiny models whose rotary frequencies depend on the length."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from transformers import PhimoeConfig, PreTrainedModel

from tests.helpers.tiny_models import VOCAB, build, gemma3, llama_gqa, phi3

SWITCH = 32
"""The greatest length with the usual frequencies."""
HEAD_DIM = 8


def longrope(head_dim: int = HEAD_DIM, **more: Any) -> dict[str, Any]:
    half = range(head_dim // 2)
    return {
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": SWITCH,
        "short_factor": [1.0 + 0.05 * i for i in half], "long_factor": [2.0 + 3.0 * i for i in half], **more,
    }  # fmt: skip


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


def _phimoe() -> PhimoeConfig:
    return PhimoeConfig(
        vocab_size=VOCAB, hidden_size=48, num_attention_heads=6, num_key_value_heads=3, intermediate_size=64,
        num_hidden_layers=2, num_local_experts=4, max_position_embeddings=128, initializer_range=0.2, pad_token_id=0,
        original_max_position_embeddings=SWITCH,
        rope_parameters=longrope(short_mscale=1.1, long_mscale=1.3), sliding_window=None,
    )  # fmt: skip


USUAL = "llama_longrope", "llama_dynamic", "phi3"
OTHERS = "phimoe", "gemma3_dynamic"


def reference_is_right(name: str) -> bool:
    """Whether transformers' own generation is a reference across the switch. In releases about 5.17, Phi-3 and PhiMoE
    drop their cache there and go on with the last token alone, as if it were the whole text."""
    if name not in ("phi3", "phimoe"):
        return True
    prepare = type(rope_model(name)).prepare_inputs_for_generation
    return "next_sequence_length" in inspect.getsource(prepare)


@cache
def rope_model(name: str) -> PreTrainedModel:
    """Every test that asks gets the same, and leaves it as it is."""
    long = {"max_position_embeddings": 128}
    if name == "llama_longrope":
        return build(llama_gqa(rope_parameters=longrope(), **long))
    if name == "llama_dynamic":
        return build(llama_gqa(rope_parameters=DYNAMIC, max_position_embeddings=SWITCH))
    if name == "phi3":
        extra = {"original_max_position_embeddings": SWITCH, "num_key_value_heads": 3, **long}
        return build(phi3(rope_parameters=longrope(), **extra))
    if name == "phimoe":
        return build(_phimoe())
    kinds = {"full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    return build(gemma3(rope_parameters=kinds, max_position_embeddings=SWITCH))
