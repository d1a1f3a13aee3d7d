"""One injection for every decoder: the same result as the unsharded model, or a refusal that names the class."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    JambaConfig,
    Llama4TextConfig,
    MambaConfig,
    PretrainedConfig,
    Qwen3NextConfig,
)

from ds_ring.engine.engine import Engine
from ds_ring.errors import UnsupportedModelError
from tests.helpers.architectures import BYPASSES, CASES, GATED, NO_TENSOR_PARALLEL, SMALL
from tests.helpers.mocked_world import relative_error, serve
from tests.helpers.tiny_models import build, logits, shared, tokens

LENGTH = 101
TOLERANCE = 1e-5
"""On the worst token's relative error, fp32."""


HYBRIDS = [label for label in CASES if "ring2" in label or label.endswith("pp2")]
"""One sequence-parallel and one tensor x pipeline layout of every architecture."""


@cache
def computed(label: str) -> list[tuple[Tensor, Tensor | None]]:
    """Each rank's logits, and those of the next token as ``prefill_only`` gives them, of the same engine."""
    name, layout = CASES[label]
    ids = tokens(1, LENGTH)

    def work(engine: Engine) -> tuple[Tensor, Tensor | None]:
        return engine(ids).logits, engine.next_token_logits(ids) if label in HYBRIDS else None

    return serve(shared(name), work, **layout)


@cache
def expected(name: str) -> Tensor:
    return logits(shared(name), tokens(1, LENGTH))


@pytest.mark.parametrize("label", CASES)
def test_every_layout_equals_the_unsharded_model(label):
    for got, _ in computed(label):
        assert relative_error(got, expected(CASES[label][0])) < TOLERANCE


@pytest.mark.parametrize("label", HYBRIDS)
def test_every_architecture_gives_the_last_tokens_logits(label):
    for _, got in computed(label):
        assert relative_error(got, expected(CASES[label][0])[:, -1]) < TOLERANCE


@pytest.mark.parametrize("name", NO_TENSOR_PARALLEL)
def test_what_autotp_cannot_shard_is_refused(name):
    error, words = NO_TENSOR_PARALLEL[name]
    with pytest.raises(error, match=words):
        serve(shared(name), lambda engine: engine(tokens(1, 9)), tp_size=2)


EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1}

OTHER_LAYERS: dict[str, tuple[Callable[[], PretrainedConfig], str]] = {
    "MambaConfig": (lambda: MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2), "num_attention_heads"),
    "jamba": (lambda: JambaConfig(**GATED, attn_layer_period=2, attn_layer_offset=1), "linear_attention"),
    "qwen3_next": (lambda: Qwen3NextConfig(**GATED, **EXPERTS), "linear_attention"),
    "llama4": (lambda: Llama4TextConfig(**GATED, attention_chunk_size=16), "chunked_attention"),
}


@pytest.mark.parametrize("layout", [{"ring_degree": 2}, {"ulysses_degree": 2}, {"pp_size": 2}, {"tp_size": 2}], ids=str)
@pytest.mark.parametrize("name", BYPASSES)
def test_models_that_bypass_the_attention_interface_are_refused(name, layout):
    model = AutoModelForCausalLM.from_config(BYPASSES[name](), dtype=torch.float32)

    def never(engine: Any) -> None:
        raise AssertionError("refused before an engine exists")

    with pytest.raises(UnsupportedModelError, match=f"{name} does not go through transformers' attention interface"):
        serve(model, never, **layout)


@pytest.mark.parametrize("name", OTHER_LAYERS)
def test_layers_that_are_not_attention_are_refused_by_their_config_alone(name):
    config, word = OTHER_LAYERS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config())
    with pytest.raises(UnsupportedModelError, match=f"{name}.*{word}"):
        serve(model, lambda engine: None, ring_degree=2)


def test_values_of_another_size_than_keys_are_refused():
    config = DeepseekV3Config(
        **SMALL, num_key_value_heads=4, intermediate_size=32, first_k_dense_replace=4, kv_lora_rank=8, q_lora_rank=8,
        qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=r"DeepseekV3Attention asks for values of 8 .* queries of 12"):
        serve(build(config), lambda engine: engine(tokens(1, 9)), ring_degree=2)
