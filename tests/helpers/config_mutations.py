"""Mutations of a config.json, seeded: each is one field set to a value that it should not have, or left out."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

REMOVED = object()
VALUES: tuple[Any, ...] = (
    REMOVED, None, True, False, 0, -1, 1, 3, 2**31, 10**12, -(10**30), 1.5, 0.0, -0.5, 1e-30, 1e300, float("nan"),
    float("inf"), "", "x", "64", "auto", "../x", [], [1], ["x", None], [[2]], {}, {"a": 1}, {"type": "x"}, {"": {}},
)  # fmt: skip
MORE = (
    "attn_implementation", "_attn_implementation", "experts_implementation", "quantization_config", "auto_map",
    "transformers_weights", "rope_scaling", "rope_theta", "sliding_window", "layer_types", "text_config", "dtype",
    "torch_dtype", "num_labels", "id2label", "per_layer_config", "output_attentions", "return_dict", "fusion_config",
    "is_encoder_decoder", "get_text_config", "attribute_map", "base_model_tp_plan", "num_key_value_heads", "head_dim",
    "partial_rotary_factor", "configuration_files", "tie_word_embeddings", "use_cache", "sub_configs",
)  # fmt: skip
"""Fields that few configs have."""


def mutations(fields: dict[str, Any], count: int, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what was done, the fields with it), ``count`` times, none twice."""
    draw, seen = random.Random(seed), set()
    paths = sorted({*_paths(fields), *((name,) for name in MORE)}, key=str)
    while len(seen) < count:
        path, value = draw.choice(paths), draw.choice(VALUES)
        said = f"{'.'.join(map(str, path))}={'removed' if value is REMOVED else json.dumps(value)}"
        if said in seen or (value is REMOVED and path[0] not in fields):
            continue
        seen.add(said)
        yield said, _changed(fields, path, value)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    for name, each in value.items() if isinstance(value, dict) else ():
        yield from _paths(each, (*path, name))


def _changed(fields: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(fields)
    inner = changed
    for name in path[:-1]:
        inner = inner[name]
    if value is REMOVED:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return changed
