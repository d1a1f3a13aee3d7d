"""A checkpoint's ``config.json`` as it is written, before transformers makes objects of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ds_ring.errors import CheckpointError
from ds_ring.utils.lfs import refuse_pointer

CONFIG = "config.json"
MOST = 10_000
"""Layers, heads, experts or labels of a model. transformers makes a list of as many entries before it checks anything,
so that a number with a few digits too many takes all memory."""
COUNTS = re.compile(r"(num|n)_(\w+_)*(layers?|heads?|head|blocks?|experts|labels|nextn_predict_layers)|num_layers")
UNBOUNDED = {"time_step_limit"}
"""Fields that may be infinite: transformers writes some by default."""


def read_fields(path: str | Path) -> dict[str, Any]:
    """The fields of a checkpoint directory's config, or of a config file.

    Raises:
        CheckpointError: no such file, not a JSON object, a number that is not finite or a count beyond any model; a
            config that asks for code of its own or another file, or is of quantised weights.
    """
    file = Path(path) / CONFIG if Path(path).is_dir() else Path(path)
    fields = _json_object(file)
    if "auto_map" in fields:
        raise CheckpointError(f"{file} asks to run its own code (auto_map); only classes of transformers are loaded")
    if "configuration_files" in fields:
        raise CheckpointError(f"{file} refers to other files (configuration_files); make the right one {CONFIG}")
    try:
        flat = list(_flat(fields, ""))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file} has a __float__ that is none: {error}") from None
    for name, value in flat:
        _check_field(file, name, value)
    return fields


def _json_object(file: Path) -> dict[str, Any]:
    try:
        refuse_pointer(file)
        fields = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        if file.name == CONFIG:
            raise CheckpointError(f"{file.parent} has no {CONFIG}") from None
        raise CheckpointError(f"{file} cannot be read: no such config file") from None
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # not JSON, or not even text
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not {fields!r}")
    return fields


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every field by its dotted path, those of objects and the objects themselves."""
    if path:
        yield path, value
    if isinstance(value, dict) and "__float__" in value:  # how transformers writes what is not finite
        yield path, float(value["__float__"])
        return
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in inner:
        yield from _flat(each, f"{path}.{name}".lstrip("."))


def _check_field(file: Path, name: str, value: Any) -> None:
    path = name.split(".")
    last = path[-1]
    if last == "quantization_config" and value:
        method = value.get("quant_method") if isinstance(value, dict) else None
        raise CheckpointError(
            f"{file} has a {name} ({method or value}): quantised weights are not supported; take the checkpoint in "
            f"fp16, bf16 or fp32"
        )
    if isinstance(value, float) and not math.isfinite(value) and not (math.isinf(value) and UNBOUNDED & {*path}):
        raise CheckpointError(f"{file}: {name}={value} is not a finite number")
    if type(value) is int and abs(value) > MOST and COUNTS.fullmatch(last):
        raise CheckpointError(f"{file}: {name}={value} is beyond any model; at most {MOST} can be built")
