"""Tiny random models of many architectures, seeded, with weights large enough that a wrong position shows."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 97
MAX_POSITIONS = 2048

# At the usual 0.02 attention is nearly uniform, and a token at a wrong place would change little.
INITIALIZER_RANGE = 0.2


def gpt_neox(heads: int = 16, layers: int = 4, **overrides: Any) -> GPTNeoXConfig:
    """The paper's block in small: sequential residual, two-matrix tanh-GELU MLP four times as wide."""
    width = 8 * heads
    sizes = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width}
    return GPTNeoXConfig(
        **_common(num_hidden_layers=layers, use_parallel_residual=False, hidden_act="gelu_pytorch_tanh", **sizes)
        | _rotary(1.0)
        | overrides
    )


def pythia(**overrides: Any) -> GPTNeoXConfig:
    """Attention and MLP side by side; only a part of each head rotates."""
    return gpt_neox(**{"heads": 6, "layers": 3, "use_parallel_residual": True} | _rotary(0.5) | overrides)


def llama_gqa(**overrides: Any) -> LlamaConfig:
    """Nine query heads over three key/value heads."""
    return LlamaConfig(**_decoder(hidden_size=72, num_attention_heads=9, num_key_value_heads=3) | overrides)


def llama_mqa(**overrides: Any) -> LlamaConfig:
    """All query heads share one key/value head."""
    return LlamaConfig(**_decoder(num_key_value_heads=1) | overrides)


def qwen2(**overrides: Any) -> Qwen2Config:
    """Biases on query, key and value."""
    return Qwen2Config(**_decoder(num_key_value_heads=2) | overrides)


def qwen3(**overrides: Any) -> Qwen3Config:
    """Norms on query and key; head_dim apart from hidden_size / heads."""
    return Qwen3Config(**_decoder(num_key_value_heads=2, head_dim=12) | overrides)


def gemma(**overrides: Any) -> GemmaConfig:
    """Scaled embedding tied to the head; head_dim apart from hidden_size / heads."""
    return GemmaConfig(**_decoder(num_key_value_heads=2, head_dim=16) | overrides)


def gemma2(**overrides: Any) -> Gemma2Config:
    """Soft-capped scores and logits; every other layer sees a window only."""
    return Gemma2Config(
        **_decoder(
            num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, sliding_window=24,
            attn_logit_softcapping=5.0, final_logit_softcapping=8.0,
        )
        | overrides
    )  # fmt: skip


def gemma3(**overrides: Any) -> Gemma3TextConfig:
    """Norms on query and key, two rotary bases, windowed and full layers in turn."""
    layer_types = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    return Gemma3TextConfig(
        **_decoder(
            num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, sliding_window=24,
            num_hidden_layers=4, layer_types=layer_types,
        )
        | overrides
    )  # fmt: skip


def mistral(**overrides: Any) -> MistralConfig:
    """A sliding window in every layer."""
    return MistralConfig(**_decoder(num_key_value_heads=2, sliding_window=24) | overrides)


def mixtral(**overrides: Any) -> MixtralConfig:
    """A mixture of experts."""
    return MixtralConfig(
        **_decoder(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, sliding_window=None) | overrides
    )


def gpt_oss(**overrides: Any) -> GptOssConfig:
    """Attention sinks; windowed and full layers in turn; a mixture of experts."""
    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    return GptOssConfig(
        **_decoder(
            num_key_value_heads=2, head_dim=12, sliding_window=24, layer_types=layer_types,
            num_local_experts=4, num_experts_per_tok=2,
        )
        | overrides
    )  # fmt: skip


def phi3(**overrides: Any) -> Phi3Config:
    """Query, key and value in one matrix, gate and up in another."""
    return Phi3Config(**_decoder(num_key_value_heads=2, pad_token_id=0) | overrides)


def gpt2(**overrides: Any) -> GPT2Config:
    """Learned positions, Conv1D layers, embedding tied to the head."""
    return GPT2Config(
        **{
            "vocab_size": VOCAB, "n_embd": 48, "n_head": 6, "n_layer": 3, "n_positions": MAX_POSITIONS,
            "initializer_range": INITIALIZER_RANGE, "bos_token_id": 0, "eos_token_id": 0,
        }
        | overrides
    )  # fmt: skip


def opt(**overrides: Any) -> OPTConfig:
    """Learned positions with an offset, ReLU, embedding tied to the head."""
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "ffn_dim": 96, "word_embed_proj_dim": 48}
    return OPTConfig(**_common(num_hidden_layers=3, init_std=INITIALIZER_RANGE, **sizes) | overrides)


ARCHITECTURES: dict[str, Callable[..., PretrainedConfig]] = {
    "gpt_neox": lambda **overrides: gpt_neox(**{"heads": 6, "layers": 3} | overrides),
    "pythia": pythia,
    "llama_gqa": llama_gqa,
    "llama_mqa": llama_mqa,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "mistral": mistral,
    "mixtral": mixtral,
    "gpt_oss": gpt_oss,
    "phi3": phi3,
    "gpt2": gpt2,
    "opt": opt,
}


def build(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model of ``config`` in fp32 whose every parameter is random: biases and norms, too."""
    # Older transformers drop soft-capping under SDPA without a word.
    own = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # what a vector is added to below may be random itself: the sinks of gpt_oss
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **own).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(INITIALIZER_RANGE * noise)
            else:
                # Biases start at 0 and norms at 0 or 1, where leaving them out would not show.
                parameter.add_(0.1 * noise)
    return model


@cache
def shared(name: str) -> PreTrainedModel:
    """The model of one of ``ARCHITECTURES``. Every test that asks gets the same, and leaves it as it is."""
    return build(ARCHITECTURES[name]())


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids [rows, length]."""
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """What everything is held against: the logits [rows, length, V] of the whole model in one call."""
    with torch.inference_mode():
        return model(ids, use_cache=False).logits


def _rotary(factor: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": factor}}


def _decoder(**fields: Any) -> dict[str, Any]:
    """Llama's field names, which most families share."""
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 96, "num_hidden_layers": 3}
    return _common(**sizes | fields)


def _common(**fields: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB, "max_position_embeddings": MAX_POSITIONS, "initializer_range": INITIALIZER_RANGE, **fields,
    }  # fmt: skip
