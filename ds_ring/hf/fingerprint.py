"""Fingerprints of a model, cheap to take. Ranks with different models would give wrong tokens without an error."""

from __future__ import annotations

import hashlib
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ds_ring.config import flatten
from ds_ring.hf.checkpoint import Checkpoint

BLOCKS, BLOCK_BYTES = 8, 1 << 20
"""What is read of a file: all of a small one. Of hundreds of GB in shards that is under 1 GB."""
VALUES = 8
"""How many values of a parameter are read."""


def of_config(config: PretrainedConfig) -> dict[str, Any]:
    """Every field by its dotted path, without the path that the config was read from."""
    fields = flatten(config.to_dict(), "")
    return {f"the model's {name}": value for name, value in fields.items() if name != "_name_or_path"}


def of_files(checkpoint: Checkpoint) -> dict[str, str]:
    """Size and sampled bytes of every file with weights: its header, its end, and samples evenly between them."""
    return {f"the checkpoint's {file.name}": _sampled(file) for file in sorted(set(checkpoint.files.values()))}


def of_parameters(model: PreTrainedModel) -> dict[str, str]:
    """Shape, dtype and a few values of every parameter and buffer."""
    tensors = chain(model.named_parameters(), model.named_buffers())
    return {f"the model's tensor {name}": _digest(tensor.detach()) for name, tensor in tensors}


def _sampled(file: Path) -> str:
    size = file.stat().st_size
    last = max(0, size - BLOCK_BYTES)
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        for start in sorted({last * block // (BLOCKS - 1) for block in range(BLOCKS)}):
            opened.seek(start)
            digest.update(opened.read(BLOCK_BYTES))
    return f"{size} bytes with digest {digest.hexdigest()[:12]}"


def _digest(tensor: Tensor) -> str:
    values = tensor.reshape(-1)[:: max(1, -(-tensor.numel() // VALUES))].double().tolist()
    return f"{tuple(tensor.shape)} {tensor.dtype} with digest {hashlib.sha256(repr(values).encode()).hexdigest()[:12]}"
