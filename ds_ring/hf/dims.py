"""The dimensions of a model, read from its transformers config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.utils import CONFIG_NAME

from ds_ring.errors import CheckpointError, UnsupportedModelError, in_one_line
from ds_ring.model_dims import ModelDims


def read_config(path: str | Path) -> PretrainedConfig:
    """The transformers config of a checkpoint directory or of a config file; runs no code of the checkpoint.

    Raises:
        CheckpointError: transformers cannot read the config; the error has the file and transformers' own message.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # fields of a wrong type or size end in errors of any kind
        file = Path(path) / CONFIG_NAME if Path(path).is_dir() else path
        raise CheckpointError(f"{file} holds no config that transformers can read: {in_one_line(error)}") from None
    return config


def model_dims(config: PretrainedConfig) -> ModelDims:
    """What is the same in all layers, and the key/value heads and head size of each layer.

    Raises:
        UnsupportedModelError: the config has no attention heads, or its layers differ in something else.
    """
    text: Any = config.get_text_config()
    try:
        heads_of_layers = _heads_of_layers(text)
        return _shape(text, heads_of_layers)
    except (AttributeError, RuntimeError) as error:  # transformers raises the latter for what differs between layers
        reason = str(error).partition(". ")[0]
        raise UnsupportedModelError(
            f"{type(text).__name__}: {reason}; only decoders whose layers have attention, and equally many query "
            f"heads, can be sharded"
        ) from None


def _heads_of_layers(text: Any) -> list[tuple[int, int]]:
    """(key/value heads, head_dim) of every layer."""
    heads, layers = text.num_attention_heads, [text] * text.num_hidden_layers
    if getattr(text, "per_layer_config", None):
        layers = [text.per_layer_config[i] for i in range(text.num_hidden_layers)]
    return [
        (
            _first(layer, "num_key_value_heads", default=heads),
            _first(layer, "head_dim", default=text.hidden_size // heads),
        )
        for layer in layers
    ]


def _shape(text: Any, heads_of_layers: list[tuple[int, int]]) -> ModelDims:
    heads, positions = text.num_attention_heads, _first(text, "max_position_embeddings", default=None)
    is_rotary = bool(getattr(text, "rope_parameters", None))
    return ModelDims(
        model_type=text.model_type,
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_heads=heads,
        num_kv_heads=min(kv_heads for kv_heads, _ in heads_of_layers),
        head_dim=max(head_dim for _, head_dim in heads_of_layers),
        intermediate_size=_first(text, "intermediate_size", "ffn_dim", "n_inner", default=4 * text.hidden_size),
        vocab_size=text.vocab_size,
        max_positions=None if is_rotary else positions,
        layer_types=tuple(getattr(text, "layer_types", None) or ()),
        sliding_window=_first(text, "sliding_window", default=None),
        unlike_layers=tuple(heads_of_layers) if len(set(heads_of_layers)) > 1 else (),
        softcap=_first(text, "attn_logit_softcapping", default=None),
        intended_positions=None if positions is None else max([positions, *_scaled_positions(text, positions)]),
    )


def _scaled_positions(text: Any, positions: int) -> list[int]:
    """What scaled rotary positions reach to: ``max_position_embeddings`` is often left at what a model was trained on,
    as the cards of Qwen 2.5 have it with YaRN."""
    rope = getattr(text, "rope_parameters", None) or {}
    by_layer_type = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    return [
        int(part["factor"] * (part.get("original_max_position_embeddings") or positions))
        for part in by_layer_type
        if part.get("factor") and part.get("rope_type") != "llama3"  # which says what it was trained on and for
    ]


def _first(config: Any, *names: str, default: Any) -> Any:
    """The first of ``names`` that the config sets; families of models name the same thing differently."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), default)
