"""The dimensions of a model, read from its transformers config."""

from __future__ import annotations

import math
from typing import Any

from transformers import PretrainedConfig

from ds_ring.errors import CheckpointError, UnsupportedModelError, UserError, in_one_line
from ds_ring.model_dims import ModelDims
from ds_ring.utils.model_config import file_of

WHOLE = {
    "num_layers": "num_hidden_layers", "hidden_size": "hidden_size", "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size", "max_positions": "max_position_embeddings", "sliding_window": "sliding_window",
    "intended_positions": "max_position_embeddings",
}  # fmt: skip
"""Whole numbers among the dimensions, and what most configs call them."""
OPTIONAL = {"max_positions", "sliding_window", "intended_positions"}


def model_dims(config: PretrainedConfig) -> ModelDims:
    """What is the same in all layers, and the key/value heads and head size of each layer.

    Raises:
        UnsupportedModelError: the config has no attention heads, or its layers differ in something else.
        CheckpointError: a dimension that none can be.
    """
    try:
        text: Any = config.get_text_config()
    except ValueError as error:  # a model with several decoders
        raise UnsupportedModelError(f"{type(config).__name__}: {in_one_line(error)}") from None
    if not isinstance(text, PretrainedConfig):
        raise CheckpointError(f"{file_of(config)}: the language model's part is {text!r} instead of an object")
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{file_of(config)} is of an encoder and a decoder (is_encoder_decoder)")
    try:
        return _checked(_shape(text, _heads_of_layers(text)), config)
    except UserError:
        raise
    except (AttributeError, RuntimeError) as error:  # transformers raises the latter for what differs between layers
        reason = str(error).partition(". ")[0]
        raise UnsupportedModelError(
            f"{type(text).__name__}: {reason}; only decoders whose layers have attention, and equally many query "
            f"heads, can be sharded"
        ) from None
    except Exception as error:  # wrong types, where transformers lets them through
        raise CheckpointError(f"{file_of(config)} has dimensions that none can be: {in_one_line(error)}") from None


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
    wide = _first(text, "intermediate_size", "ffn_dim", "n_inner", default=4 * text.hidden_size)
    return ModelDims(
        model_type=text.model_type,
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_heads=heads,
        num_kv_heads=min((kv_heads for kv_heads, _ in heads_of_layers), default=heads),
        head_dim=max((head_dim for _, head_dim in heads_of_layers), default=1),
        intermediate_size=max(wide) if isinstance(wide, list) else wide,
        vocab_size=text.vocab_size,
        max_positions=None if is_rotary else positions,
        layer_types=tuple(getattr(text, "layer_types", None) or ()),
        sliding_window=_first(text, "sliding_window", default=None),
        unlike_layers=tuple(heads_of_layers) if len(set(heads_of_layers)) > 1 else (),
        softcap=_first(text, "attn_logit_softcapping", default=None),
        intended_positions=_intended_positions(text, positions) if type(positions) is int else positions,
    )


def _intended_positions(text: Any, positions: int) -> int:
    """What scaled rotary positions reach to, if that is more: ``max_position_embeddings`` is often left at what a model
    was trained on, as the cards of Qwen 2.5 have it with YaRN."""
    rope = getattr(text, "rope_parameters", None) or {}
    by_layer_type = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    scaled = [
        math.ceil(float(part["factor"]) * (part.get("original_max_position_embeddings") or positions))
        for part in by_layer_type
        if part.get("factor") and part.get("rope_type") != "llama3"  # which says what it was trained on and for
    ]
    return max([positions, *scaled])


def _checked(dims: ModelDims, config: PretrainedConfig) -> ModelDims:
    for field, name in WHOLE.items():
        value = getattr(dims, field)
        least = 0 if field == "sliding_window" else 1  # some write 0 for none
        if not (value is None and field in OPTIONAL) and (type(value) is not int or value < least):
            raise CheckpointError(f"{file_of(config)}: {name}={value!r} must be a whole number of at least {least}")
    if "sliding_attention" in dims.layer_types and not dims.sliding_window:
        raise CheckpointError(
            f"{file_of(config)}: layer_types has sliding_attention, but sliding_window={dims.sliding_window!r} says "
            f"not how many tokens such a layer sees; give sliding_window, or make these layers full_attention"
        )
    return dims


def _first(config: Any, *names: str, default: Any) -> Any:
    """The first of ``names`` that the config sets; families of models name the same thing differently."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), default)
