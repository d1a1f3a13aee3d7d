"""transformers' tensor-parallel plan of a decoder: how each weight is cut."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def tp_plan(model: Any) -> dict[str, str]:
    """By the name of a module or of a parameter in the decoder, with ``*`` for numbers; empty where there is none."""
    return getattr(model.config.get_text_config(), "base_model_tp_plan", None) or {}


def style_of(plan: Mapping[str, str], name: str) -> str | None:
    """How the plan has the parameter ``name`` of the decoder: by its module, or by itself."""
    owner, _, _ = name.rpartition(".")
    return plan.get(pattern(owner)) or plan.get(pattern(name))


def pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
