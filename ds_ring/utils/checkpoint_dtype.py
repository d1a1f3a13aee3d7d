"""The dtype of a checkpoint's weights, as transformers' ``dtype="auto"`` finds it, without importing transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open

from ds_ring.errors import CheckpointError
from ds_ring.utils.config_file import read_fields
from ds_ring.utils.hub import local_checkpoint
from ds_ring.utils.weight_files import metadata_of, single_or_index, tensor_names, weight_files

AUTO = "auto"
PARTS = ("text_config", "decoder", "generator", "llm_config", "language_config", "thinker_config")
"""What configs of several parts call the one of the language model, first in the list first."""
NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""safetensors' names of the dtypes that a whole model can have."""


def checkpoint_dtype(model: object) -> str | None:
    """The dtype that config.json says at its top, else that of its language model's part, else the one of the first
    floating tensor; of a config file, what it says. None where nothing is said, or nothing can be read: what is wrong
    with a checkpoint is said where it is opened for its own sake.
    """
    if not isinstance(model, str):
        return None
    path = local_checkpoint(model)
    try:
        fields = read_fields(path)
        return _declared(fields) or (_of_weights(path, fields) if path.is_dir() else None)
    except (CheckpointError, OSError):
        return None


def _declared(fields: dict[str, Any]) -> str | None:
    said = next((fields[name] for name in ("dtype", "torch_dtype") if fields.get(name) is not None), AUTO)
    if said != AUTO:
        return str(said)
    parts = (fields[name] for name in PARTS if isinstance(fields.get(name), dict))
    return next((found for part in parts if (found := _declared(part))), None)


def _of_weights(directory: Path, fields: dict[str, Any]) -> str | None:
    chosen = single_or_index(directory, fields)
    if chosen.suffix == ".json" and (said := metadata_of(chosen).get("dtype")):
        return str(said)
    first = weight_files(directory, fields)[0]
    names = tensor_names(first)
    with safe_open(first, framework="np") as opened:
        return next((NAMES[kind] for each in names if (kind := opened.get_slice(each).get_dtype()) in NAMES), None)
