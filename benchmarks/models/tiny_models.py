"""Small models of every architecture of transformers, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SEED = 0
LARGEST = 20_000_000
"""Parameters of a model that is checked, at most."""
SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 512, "sliding_window": 24,
    "ffn_dim": 96, "word_embed_proj_dim": 48, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8,
    "num_layers": 2, "ffn_hidden_size": 96, "query_pre_attn_scalar": 8, "kv_lora_rank": 16, "q_lora_rank": 16,
    "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8, "image_size": 28, "patch_size": 14,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""Fields that are set where a config has them."""
SWITCH = 32
"""The greatest length with the usual frequencies, of rotary positions that depend on the length."""
NEVER_NONE = {"head_dim", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok"}
"""Fields that are set even where their default is None, which some models can only replace from a checkpoint."""
LATENT_ATTENTION = {
    "num_key_value_heads": 6, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "head_dim": 4,
}  # fmt: skip
"""Fields that are set where keys and values come from one compressed vector."""


def architectures() -> list[str]:
    """Model types with a causal LM."""
    return sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING)


def tiny_config(model_type: str, rope: str = "") -> PretrainedConfig:
    """The architecture's default config with ``SIZES``, and one layer of each kind where it has several; ``rope``: one
    of ``ropes_of`` in place of its own kind of rotary positions."""
    config = _tiny(CONFIG_MAPPING[model_type])
    return _with_rope(config, rope) if rope else config


def ropes_of(model_type: str) -> tuple[str, ...]:
    """Kinds of rotary positions that depend on a text's length, for models that may have them."""
    try:
        text: Any = tiny_config(model_type).get_text_config()
    except Exception:  # as ``check_models`` says of a type that has no small config
        return ()
    return ("longrope", "dynamic") if getattr(text, "rope_parameters", None) else ()


def _with_rope(config: PretrainedConfig, kind: str) -> PretrainedConfig:
    text: Any = config.get_text_config()
    by_layer_type = {name: part for name, part in text.rope_parameters.items() if isinstance(part, dict)}
    parts = list(by_layer_type.values()) or [text.rope_parameters]
    if kind == "dynamic":
        text.max_position_embeddings = SWITCH
    elif hasattr(text, "original_max_position_embeddings"):
        text.original_max_position_embeddings = SWITCH
    for part in parts:
        width = int(text.head_dim if getattr(text, "head_dim", None) else text.hidden_size // text.num_attention_heads)
        # NTK scaling divides by the number of rotated elements less 2.
        part["partial_rotary_factor"] = max(part.get("partial_rotary_factor", 1.0), 4 / width)
        half = range(int(width * part["partial_rotary_factor"]) // 2)
        part |= {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": SWITCH}
        if kind == "longrope":
            part["short_factor"] = [1.0 + 0.05 * i for i in half]
            part["long_factor"] = [2.0 + 3.0 * i for i in half]
            if text.model_type == "phimoe":
                part |= {"short_mscale": 1.1, "long_mscale": 1.3}
    return config


def _tiny(kind: type[PretrainedConfig]) -> PretrainedConfig:
    default = kind()
    sizes = {
        name: value
        for name, value in SIZES.items()
        if _sets(default, name) or (name in NEVER_NONE and hasattr(default, name))
        if not isinstance(getattr(kind, name, None), property)
    }
    if _sets(default, "kv_lora_rank"):
        sizes |= LATENT_ATTENTION
    # Some derive the kinds of their layers from other fields.
    if (layer_types := getattr(default, "layer_types", None)) and not isinstance(
        getattr(kind, "layer_types", None), property
    ):
        kinds = list(dict.fromkeys(layer_types))
        sizes["layer_types"] = (kinds * 2)[: max(2, len(kinds))]
        sizes["num_hidden_layers"] = len(sizes["layer_types"])
    for name in kind.sub_configs:
        if isinstance(part := getattr(default, name, None), PretrainedConfig):
            sizes[name] = _tiny(type(part)).to_dict()
    config: PretrainedConfig = kind(**sizes)
    return config


def _sets(config: PretrainedConfig, name: str) -> bool:
    try:
        return getattr(config, name, None) is not None
    except RuntimeError:  # transformers raises it for a field that differs between layers
        return True


def tiny_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model with large random weights: at the usual scale of 0.02 attention is nearly uniform, and hides errors."""
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count:,} parameters: some of its sizes have names of their own, and stay large")
    torch.manual_seed(SEED)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    return model
