"""Rotary position embedding of q and k in one pass, in place of a model's own chain of copies.

Attention modules that call transformers' rotary function get a ``KVFirstForward``, around two versions of their own
forward: one that rotates q and k into new memory, and one that rotates them in place.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ds_ring.fusion.kv_first import KVFirstForward
from ds_ring.kernels import elementwise

NAME = "apply_rotary_pos_emb"
"""What modelling files of transformers call the rotary function."""

Rotate = Callable[..., tuple[Tensor, Tensor]]


def fuse_rotary(model: nn.Module) -> int:
    """Give attention modules that call ``NAME`` a forward that calls our rotation; how many there were.

    The forward is the class's own code, in which one global name is bound to another function, for these modules only.
    The modelling file and other models of the class stay as they are.
    """
    count = 0
    for module in model.modules():
        forward = type(module).forward
        if "forward" in vars(module) or not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
            continue
        original = forward.__globals__.get(NAME)
        if NAME not in forward.__code__.co_names or original is None or not rotates_by_halves(original):
            continue
        own, own_in_place = (_with_rotary(forward, rotation(original)) for rotation in (_one_pass, _in_place))
        module.forward = MethodType(KVFirstForward(own, own_in_place, NAME), module)
        count += 1
    return count


def _with_rotary(forward: FunctionType, rotate: Rotate) -> FunctionType:
    names = {**forward.__globals__, NAME: rotate}
    bound = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    bound.__kwdefaults__ = forward.__kwdefaults__
    # transformers reads a forward's annotations.
    bound.__annotations__ = forward.__annotations__
    return bound


def rotates_by_halves(original: Rotate) -> bool:
    """Whether a model's function computes what ``elementwise.rotate`` does; others rotate neighbouring columns."""
    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (
        torch.randn(shape, generator=generator) for shape in ((2, 4, 3, 8), (2, 2, 3, 8), (2, 3, 8), (2, 3, 8))
    )
    try:
        got = original(q, k, cos, sin)
        return all(
            torch.allclose(a, b, atol=1e-5) for a, b in zip(got, elementwise.rotate(q, k, cos, sin), strict=True)
        )
    except Exception:  # other arguments
        return False


def _one_pass(original: Rotate) -> Rotate:
    return _where_usual(elementwise.rotate, original)


def _in_place(original: Rotate) -> Rotate:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return elementwise.rotate_(q, (cos, sin)), elementwise.rotate_(k, (cos, sin))

    return _where_usual(rotate, original)


def _where_usual(ours: Rotate, original: Rotate) -> Rotate:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        usual = q.dim() == 4 and k.dim() == 4 and cos.dim() == 3 and cos.stride(-1) == 1 and sin.stride(-1) == 1
        if args or kwargs or not usual or q.stride(-1) != 1 or k.stride(-1) != 1:
            return original(q, k, cos, sin, *args, **kwargs)
        return ours(q, k, cos, sin)

    return rotate
