"""A checkpoint's ``config.json`` as it is written, before transformers makes objects of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ds_ring.errors import CheckpointError
from ds_ring.utils.file_kind import not_a_file
from ds_ring.utils.lfs import refuse_pointer

CONFIG = "config.json"
MOST = {
    re.compile(r"(num|n)_(\w+_)*(layers?|blocks?)"): 10_000,
    re.compile(r"(num|n)_(\w+_)*(heads?|experts|labels)"): 1_000_000,
}
"""How many of something a model has, at most. transformers makes a list or a module for each before it checks anything,
so that a number with a few digits too many takes all memory."""
POSITIVE = {"attn_logit_softcapping", "final_logit_softcapping", "logits_soft_cap"}
"""Numbers that are divided by."""
NOT_NEGATIVE = re.compile(r"\w+_(eps|epsilon)|initializer_range|init_std|initializer_std")
"""Numbers whose root is taken, and deviations. Not all classes check their type."""
LARGEST = 3.4e38
"""Of fp32, in which models compute with what a config says."""
UNBOUNDED = {"time_step_limit"}
"""Fields that may be infinite: transformers writes some by default."""


def read_fields(path: str | Path) -> dict[str, Any]:
    """The fields of a checkpoint directory's config, or of a config file.

    Raises:
        CheckpointError: no such file, not a JSON object, a number that is not finite or is beyond any model; a
            config that asks for code of its own or another file, or is of quantised weights.
    """
    file = Path(path) / CONFIG if Path(path).is_dir() else Path(path)
    fields = _json_object(file)
    if "auto_map" in fields:
        raise CheckpointError(f"{file} asks to run its own code (auto_map); only classes of transformers are loaded")
    if "configuration_files" in fields:
        raise CheckpointError(f"{file} refers to other files (configuration_files); make the right one {CONFIG}")
    for name, value in _flat(fields, ""):
        _check_field(file, name, value)
    return fields


def _json_object(file: Path) -> dict[str, Any]:
    try:
        refuse_pointer(file)
        fields = json.loads(file.read_text(encoding="utf-8"), object_hook=_with_infinities)
    except OSError:
        if (why := not_a_file(file)) is not None:
            raise CheckpointError(f"{file} {why}") from None
        if file.name == CONFIG:
            raise CheckpointError(f"{file.parent} has no {CONFIG}") from None
        raise CheckpointError(f"{file} cannot be read: no such config file") from None
    except CheckpointError:
        raise
    except (ValueError, TypeError, RecursionError) as error:  # not JSON, or not even text
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not {fields!r}")
    return fields


def _with_infinities(value: dict[str, Any]) -> Any:
    """transformers writes a number that is not finite as an object."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every field by its dotted path, those of objects and the objects themselves."""
    if path:
        yield path, value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in inner:
        yield from _flat(each, f"{path}.{name}".lstrip("."))


def _check_field(file: Path, name: str, value: Any) -> None:
    path = name.split(".")
    last = path[-1]
    if last == "quantization_config" and value is not None:
        method = value.get("quant_method") if isinstance(value, dict) else None
        raise CheckpointError(
            f"{file} has a {name} ({method or value}): quantised weights are not supported; take the checkpoint in "
            f"fp16, bf16 or fp32"
        )
    if isinstance(value, float) and not abs(value) <= LARGEST and not (math.isinf(value) and UNBOUNDED & {*path}):
        raise CheckpointError(f"{file}: {name}={value} is not a number that fp32 has")
    number = type(value) in (int, float)
    if value is not None and last in POSITIVE and not (number and value > 0):
        raise CheckpointError(f"{file}: {name}={value!r} must be a number above 0")
    if value is not None and NOT_NEGATIVE.fullmatch(last) and not (number and value >= 0):
        raise CheckpointError(f"{file}: {name}={value!r} must be a number of at least 0")
    for pattern, most in MOST.items():
        if type(value) is int and abs(value) > most and pattern.fullmatch(last):
            raise CheckpointError(f"{file}: {name}={value} is beyond any model; at most {most} can be built")
