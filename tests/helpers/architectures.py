"""Models by architecture: the layouts each is tried in, and those that are refused."""

from __future__ import annotations

from collections.abc import Callable

from transformers import (
    BertConfig,
    BloomConfig,
    FalconConfig,
    GPTJConfig,
    MptConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from ds_ring.errors import ConfigError, UnsupportedModelError
from ds_ring.hf.dims import model_dims
from tests.helpers.tiny_models import ARCHITECTURES, build

NO_TENSOR_PARALLEL = {
    "llama_mqa": (ConfigError, "num_kv_heads=1 is not divisible by tp_size=2"),
    "gpt2": (UnsupportedModelError, "GPT2LMHeadModel cannot be sharded by DeepSpeed's AutoTP"),
    "phi3": (UnsupportedModelError, "Phi3Attention attends with 5 heads a rank where tp_size=2 leaves 3 of 6"),
}


def layouts_of(config: PretrainedConfig, tensor_parallel: bool) -> dict[str, dict[str, int | str]]:
    dims = model_dims(config)
    ulysses = 2 if dims.num_heads % 2 == 0 else 3
    layouts: dict[str, dict[str, int | str]] = {
        "ring3": {"ring_degree": 3, "ring_variant": "gather_kv"},
        "ring3_pass_kv": {"ring_degree": 3, "ring_variant": "pass_kv"},
        "ulysses3": {"ulysses_degree": 3},
        f"ulysses{ulysses}_ring2": {"ulysses_degree": ulysses, "ring_degree": 2},
        "pp2": {"pp_size": 2},
    }
    if tensor_parallel:
        tp = 2 if dims.num_kv_heads % 2 == 0 else 3
        layouts |= {f"tp{tp}": {"tp_size": tp}, f"tp{tp}_pp2": {"tp_size": tp, "pp_size": 2}}
    return layouts


CASES = {
    f"{name}-{label}": (name, layout)
    for name, config in ARCHITECTURES.items()
    for label, layout in layouts_of(config(), name not in NO_TENSOR_PARALLEL).items()
}


SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}


GATED = SMALL | {"num_key_value_heads": 2, "intermediate_size": 32}


BYPASSES: dict[str, Callable[[], PretrainedConfig]] = {
    "GPTJForCausalLM": lambda: GPTJConfig(vocab_size=97, n_embd=32, n_head=4, n_layer=2, rotary_dim=4),
    "BloomForCausalLM": lambda: BloomConfig(vocab_size=97, hidden_size=32, n_head=4, n_layer=2),
    "FalconForCausalLM": lambda: FalconConfig(**SMALL),
    "MptForCausalLM": lambda: MptConfig(vocab_size=97, d_model=32, n_heads=4, n_layers=2),
}


def bert() -> PreTrainedModel:
    return build(
        BertConfig(
            vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=2048,
        )
    )  # fmt: skip
