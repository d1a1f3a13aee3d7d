"""Another implementation's attention behind transformers' attention interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from ds_ring.errors import UnsupportedModelError
from ds_ring.hf.attention import attend_by

_ATTRIBUTE = "_ds_ring_baseline"
_DROPPED = ("softcap", "sliding_window", "s_aux", "position_bias")

Attend = Callable[..., tuple[Tensor, None]]
"""As transformers calls an attention: (module, query, key, value, mask, **options), tensors [B, heads, T, D]."""


def attach(model: PreTrainedModel, name: str, attend: Attend) -> None:
    """Make ``model``, and no other, attend by ``attend``.

    The name has no mask function, as ours has none. Baselines know causality only: a mask of a rank's own tokens would
    mean nothing to them, and transformers would take a zigzag rank's positions for packed sequences.
    """
    AttentionInterface.register(name, _attention)
    bypasses = f"does not go through transformers' attention interface, so {name} cannot serve it"
    attend_by(model, name, _ATTRIBUTE, attend, bypasses)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    asked = [name for name in _DROPPED if options.get(name) is not None]
    if attention_mask is not None:
        asked.append("a mask of its own")
    if asked:
        raise UnsupportedModelError(
            f"{type(module).__name__} asks for {', '.join(asked)}, which other implementations leave out silently; "
            f"implementation=ds_ring has it"
        )
    attend: Attend = getattr(module, _ATTRIBUTE)
    return attend(module, query, key, value, None, **options)
