"""Which operations of a layer treat every token alike, so that they may run on some of the tokens at a time."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from ds_ring.fusion.modules import AddLinear, AddNorm, Gated, LinearGelu, Sum
from ds_ring.fusion.recognize import Norm, activation_of
from ds_ring.hf.linear import Linear

_FUNCTIONS = (operator.add, operator.mul, torch.add, torch.mul)
_VIEWS = ("view", "reshape", "transpose", "chunk", "split", "contiguous", "size")
"""Methods that attention modules call on the result of a projection; they do not mix its tokens."""


def is_token_wise_in_attention(node: fx.Node, modules: dict[str, nn.Module], functions: Sequence[Any]) -> bool:
    """Whether a node among an attention's projections treats every token alike; ``functions`` do as well."""
    if node.op == "call_method":
        return node.target in _VIEWS
    if node.op == "call_module":
        return _is_token_wise(modules[str(node.target)])
    return node.target in (operator.getitem, *functions)


def is_token_wise(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node of a layer's forward, outside its attention, treats every token alike."""
    if node.op == "call_module":
        return _is_token_wise(modules[str(node.target)])
    if node.op == "call_method":
        # A gate and what it gates, out of one projection.
        return node.target == "chunk" and (*node.args[2:], *node.kwargs.values()) == (-1,)
    return node.op == "call_function" and node.target in (operator.getitem, *_FUNCTIONS)


def is_linear(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node is a linear layer, fused or not."""
    module = modules[str(node.target)] if node.op == "call_module" else None
    return isinstance(module, (AddLinear, LinearGelu)) or (module is not None and Linear.of(module) is not None)


def _is_token_wise(module: nn.Module) -> bool:
    if isinstance(module, (AddNorm, AddLinear, Gated, LinearGelu, Sum)):
        return True
    return Linear.of(module) is not None or Norm.of(module) is not None or activation_of(module) is not None
