"""A checkpoint directory with safetensors, checked before anything is loaded from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ds_ring.errors import CheckpointError
from ds_ring.utils.config_file import read_fields
from ds_ring.utils.weight_files import tensor_names, weight_files


@dataclass(frozen=True)
class Checkpoint:
    """Tensor names and the files that hold them (``utils.weight_files``). Every loader takes its tensors from here, so
    that all layouts have the same weights, and the fingerprint is of them."""

    directory: Path
    files: dict[str, Path]

    @classmethod
    def open(cls, directory: str | Path) -> Checkpoint:
        """Check the directory and list its tensors.

        Raises:
            CheckpointError: no safetensors (pickled weights are never read), a missing or truncated shard, two sets of
                weights, or a config that asks for code of its own or is of quantised weights.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise CheckpointError(
                f"{directory} is not a checkpoint directory, nor a hub id in the local cache; get one with `hf "
                f"download`, or make one with launch/make_checkpoint.py"
            )
        shards = weight_files(directory, read_fields(directory))
        return cls(directory, {name: shard for shard in shards for name in tensor_names(shard)})

    def lazy_tensors(self) -> dict[str, Any]:
        """A slice object for every tensor; its bytes are read only when it is indexed."""
        opened = {file: safe_open(file, framework="pt") for file in set(self.files.values())}
        return {name: opened[file].get_slice(name) for name, file in self.files.items()}
