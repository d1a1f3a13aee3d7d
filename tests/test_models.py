"""One injection for every decoder: the same result as the unsharded model, or a refusal that names the class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mocked_world import relative_error, serve
from tiny_models import ARCHITECTURES, build, logits, tokens
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    GPTJConfig,
    JambaConfig,
    Llama4TextConfig,
    MambaConfig,
    MptConfig,
    PretrainedConfig,
    Qwen3NextConfig,
)

from ds_ring.errors import ConfigError, UnsupportedModelError
from ds_ring.hf.shape import model_shape

LENGTH = 101
TOLERANCE = 1e-5
"""On the worst token's relative error, fp32."""

NO_TENSOR_PARALLEL = {
    "llama_mqa": (ConfigError, "num_kv_heads=1 is not divisible by tp_size=2"),
    "gpt2": (UnsupportedModelError, "GPT2LMHeadModel cannot be sharded by DeepSpeed's AutoTP"),
    "phi3": (UnsupportedModelError, "Phi3Attention attends with 5 heads a rank where tp_size=2 leaves 3 of 6"),
}


def layouts_of(config: PretrainedConfig, tensor_parallel: bool) -> dict[str, dict[str, int | str]]:
    shape = model_shape(config)
    ulysses = 2 if shape.num_heads % 2 == 0 else 3
    layouts: dict[str, dict[str, int | str]] = {
        "ring3": {"ring_degree": 3, "ring_variant": "gather_kv"},
        "ring3_pass_kv": {"ring_degree": 3, "ring_variant": "pass_kv"},
        "ulysses3": {"ulysses_degree": 3},
        f"ulysses{ulysses}_ring2": {"ulysses_degree": ulysses, "ring_degree": 2},
        "pp2": {"pp_size": 2},
    }
    if tensor_parallel:
        tp = 2 if shape.num_kv_heads % 2 == 0 else 3
        layouts |= {f"tp{tp}": {"tp_size": tp}, f"tp{tp}_pp2": {"tp_size": tp, "pp_size": 2}}
    return layouts


CASES = {
    f"{name}-{label}": (name, layout)
    for name, config in ARCHITECTURES.items()
    for label, layout in layouts_of(config(), name not in NO_TENSOR_PARALLEL).items()
}


@pytest.mark.parametrize(("name", "layout"), CASES.values(), ids=CASES.keys())
def test_every_layout_equals_the_unsharded_model(name, layout):
    model, ids = build(ARCHITECTURES[name]()), tokens(1, LENGTH)
    want = logits(model, ids)
    for got in serve(model, lambda engine: engine(ids).logits, **layout):
        assert relative_error(got, want) < TOLERANCE


@pytest.mark.parametrize("name", NO_TENSOR_PARALLEL)
def test_what_autotp_cannot_shard_is_refused(name):
    error, words = NO_TENSOR_PARALLEL[name]
    with pytest.raises(error, match=words):
        serve(build(ARCHITECTURES[name]()), lambda engine: engine(tokens(1, 9)), tp_size=2)


SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
GATED = SMALL | {"num_key_value_heads": 2, "intermediate_size": 32}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1}

BYPASSES: dict[str, Callable[[], PretrainedConfig]] = {
    "GPTJForCausalLM": lambda: GPTJConfig(vocab_size=97, n_embd=32, n_head=4, n_layer=2, rotary_dim=4),
    "BloomForCausalLM": lambda: BloomConfig(vocab_size=97, hidden_size=32, n_head=4, n_layer=2),
    "FalconForCausalLM": lambda: FalconConfig(**SMALL),
    "MptForCausalLM": lambda: MptConfig(vocab_size=97, d_model=32, n_heads=4, n_layers=2),
}
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
