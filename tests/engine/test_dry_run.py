"""What cannot be sharded is refused by a model's config alone, before ranks connect and weights load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import (
    DeepseekV3Config,
    HunYuanDenseV1Config,
    NanoChatConfig,
    Olmo2Config,
    OlmoeConfig,
    PersimmonConfig,
    PretrainedConfig,
    T5Config,
)

import ds_ring
from ds_ring import api
from ds_ring.config import RunConfig
from ds_ring.engine.dry_run import dry_run
from ds_ring.errors import CheckpointError, UnsupportedModelError
from ds_ring.hf.dims import model_dims
from tests.helpers.architectures import BYPASSES, NO_TENSOR_PARALLEL, SMALL, bert
from tests.helpers.mocked_world import serve
from tests.helpers.rope_models import DYNAMIC, longrope
from tests.helpers.tiny_models import ARCHITECTURES, build, gpt2, llama_gqa, mixtral, phi3, tokens


def rehearsed(config: PretrainedConfig, **layout: Any) -> None:
    dry_run(config, RunConfig.load({"dtype": "fp16"}, **layout))


def persimmon() -> PretrainedConfig:
    return PersimmonConfig(**SMALL, intermediate_size=64)


def hunyuan() -> PretrainedConfig:
    return HunYuanDenseV1Config(**SMALL, intermediate_size=64, num_key_value_heads=4, head_dim=8, pad_token_id=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_that_work_pass_in_every_layout(name):
    config = ARCHITECTURES[name]()
    for layout in ({}, {"ring_degree": 3}, {"pp_size": 2}):
        rehearsed(config, **layout)
    if name not in NO_TENSOR_PARALLEL:
        rehearsed(config, tp_size=2 if model_dims(config).num_kv_heads % 2 == 0 else 3)


@pytest.mark.parametrize("rope", [DYNAMIC, longrope()], ids=["dynamic", "longrope"])
def test_what_autotp_cannot_cut_is_found_behind_rotary_modules_that_compare_lengths(rope):
    config = Olmo2Config(**SMALL, intermediate_size=64, rope_parameters=rope)
    rehearsed(config, ring_degree=2)
    with pytest.raises(UnsupportedModelError, match="Olmo2ForCausalLM cannot be sharded by DeepSpeed's AutoTP"):
        rehearsed(config, tp_size=2)


@pytest.mark.parametrize("name", BYPASSES)
def test_models_that_bypass_the_attention_interface(name):
    with pytest.raises(UnsupportedModelError, match=f"{name} does not go through transformers' attention interface"):
        rehearsed(BYPASSES[name](), ring_degree=2)


@pytest.mark.parametrize("layout", [{"ring_degree": 2}, {"tp_size": 2}], ids=str)
def test_what_the_first_forward_would_refuse(layout):
    with pytest.raises(UnsupportedModelError, match="BertSelfAttention asks for bidirectional attention"):
        rehearsed(bert().config, **layout)
    latent = DeepseekV3Config(
        **SMALL, num_key_value_heads=4, intermediate_size=32, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=r"DeepseekV3Attention asks for values of 8 .* queries of 12"):
        rehearsed(latent, **layout)
    with pytest.raises(UnsupportedModelError, match="makes no causal LM of this T5Config"):
        rehearsed(T5Config(), **layout)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (llama_gqa(hidden_act="nonsense"), "transformers makes no causal LM of .*: hidden_act='nonsense'"),
        (mixtral(num_experts_per_tok=9), "MixtralForCausalLM fails at its first forward with this config: .*k "),
    ],
    ids=["building", "forward"],
)  # fmt: skip
def test_configs_that_make_no_model(config, words):
    with pytest.raises(CheckpointError, match=f"^config.json: {words}"):
        rehearsed(config, ring_degree=2)


CONFIGS: dict[str, tuple[Callable[[], PretrainedConfig], str]] = {
    "Conv1D": (gpt2, "AutoTP not supported"),
    "query, key and value in one": (phi3, "a rank attends with 5 heads instead of 3"),
    "norms over all heads, before experts": (
        lambda: OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2), "of length 16",
    ),
    "names that AutoTP does not know": (
        lambda: NanoChatConfig(**SMALL, intermediate_size=64), r"layers\.0\.mlp\.fc2 takes 64 elements .* given 32",
    ),
    "a class's name that looks like another": (persimmon, r"query_key_value for all queries, then all keys"),
    "a class's name with another's inside": (hunyuan, r"takes model\.layers\.0\.self_attn\.v_proj for the Yuan"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "words"), CONFIGS.values(), ids=CONFIGS.keys())
def test_what_autotp_cannot_cut(config, words):
    with pytest.raises(UnsupportedModelError, match=f"cannot be sharded by DeepSpeed's AutoTP .*{words}.*take pp_size"):
        rehearsed(config(), tp_size=2)
    rehearsed(config(), ring_degree=2)


@pytest.mark.parametrize("config", [persimmon, hunyuan])
def test_models_that_autotp_takes_for_others_get_no_engine_either(config):
    """They would run, and give other logits without a word."""
    with pytest.raises(UnsupportedModelError, match=r"AutoTP .*it takes"):
        serve(build(config()), lambda engine: engine(tokens(1, 9)), tp_size=2, max_length=9)


def test_nothing_is_connected_or_loaded_before(tmp_path, monkeypatch):
    build(gpt2()).save_pretrained(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("connect", "load_stage", "load_model"):
        monkeypatch.delattr(api, name)
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel"):
        ds_ring.from_pretrained(tmp_path, {"dtype": "fp32"}, tp_size=2)
