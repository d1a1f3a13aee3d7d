"""Long-context inference of HuggingFace models with the sequence sharded over GPUs, through DeepSpeed."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["ConfigError", "DsRingError", "RunConfig", "UserError", "from_pretrained", "init_inference"]

_HOME = {
    "from_pretrained": "ds_ring.api",
    "init_inference": "ds_ring.api",
    "RunConfig": "ds_ring.config",
    "ConfigError": "ds_ring.errors",
    "DsRingError": "ds_ring.errors",
    "UserError": "ds_ring.errors",
}


def __getattr__(name: str) -> Any:
    # Importing torch, transformers and DeepSpeed takes seconds; a wrong configuration is refused without them.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
