"""A checkpoint directory with safetensors, checked before anything is loaded from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ds_ring.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """Tensor names and the files that hold them."""

    directory: Path
    files: dict[str, Path]

    @classmethod
    def open(cls, directory: str | Path) -> Checkpoint:
        """Check the directory and list its tensors.

        Raises:
            CheckpointError: no safetensors (pickled weights are never read), a missing or truncated shard, an index
                that points outside the directory, or a config that asks for code of its own or is of quantised weights.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise CheckpointError(
                f"{directory} is not a checkpoint directory, nor a hub id in the local cache; get one with `hf "
                f"download`, or make one with launch/make_checkpoint.py"
            )
        _check_config(directory)
        if (directory / INDEX).is_file():
            shards = _indexed_shards(directory)
        elif (directory / SINGLE).is_file():
            shards = [directory / SINGLE]
        else:
            pickled = sorted(p.name for p in directory.glob("*.bin")) + sorted(p.name for p in directory.glob("*.pt"))
            what = f"only pickled weights ({pickled[0]}), which can run code" if pickled else "no weights"
            raise CheckpointError(f"{directory} has {what}; save it with model.save_pretrained(…), as {SINGLE}")
        return cls(directory, {name: shard for shard in shards for name in _tensor_names(shard)})

    def lazy_tensors(self) -> dict[str, Any]:
        """A slice object for every tensor; its bytes are read only when it is indexed."""
        opened = {file: safe_open(file, framework="pt") for file in set(self.files.values())}
        return {name: opened[file].get_slice(name) for name, file in self.files.items()}


def _check_config(directory: Path) -> None:
    try:
        config = json.loads((directory / "config.json").read_text())
    except OSError:
        raise CheckpointError(f"{directory} has no config.json") from None
    except ValueError as error:  # not JSON, or not even text
        raise CheckpointError(f"{directory}/config.json is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{directory}/config.json must hold a JSON object, not {config!r}")
    if "auto_map" in config:
        raise CheckpointError(
            f"{directory}/config.json asks to run its own code (auto_map); only classes of transformers are loaded"
        )
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise CheckpointError(
            f"{directory}/config.json has a quantization_config ({method or quantised}): quantised weights are not "
            f"supported; take the checkpoint in fp16, bf16 or fp32"
        )


def _indexed_shards(directory: Path) -> list[Path]:
    try:
        weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{directory / INDEX} is not a safetensors index: {error!r}") from None
    if outside:
        raise CheckpointError(f"{directory / INDEX} points outside its directory: {outside[0]}")
    for name in names:
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory} lacks the shard {name} that its index names")
    return [directory / name for name in names]


def _tensor_names(shard: Path) -> list[str]:
    try:
        with safe_open(shard, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise CheckpointError(f"{shard} is damaged or truncated: {error}") from None
