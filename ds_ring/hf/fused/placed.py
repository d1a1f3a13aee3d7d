"""An attention module's forward that writes keys, values and queries where they belong, keys and values first.

Where peers read this layer's keys and values, they are rotated and projected into the memory that peers read, and set
out while queries are still being made. Anywhere else the module runs as it is.
"""

# Shapes: B batch, l tokens, H query heads, K key/value heads, D head_dim.
from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ds_ring.attention.place import Place
from ds_ring.attention.ulysses import HeadPart
from ds_ring.hf.attention import asked
from ds_ring.hf.context import AttentionContext, context_of
from ds_ring.hf.fused.product import Product
from ds_ring.hf.fused.split import Split, split
from ds_ring.hf.fused.trace import Untraceable, is_constant
from ds_ring.kernels import rowwise
from ds_ring.kernels.rowwise import Turn

log = logging.getLogger("ds_ring")


class PlacedForward:
    """Called as the bound forward of one module."""

    def __init__(self, whole: FunctionType, rotary: str) -> None:
        """``whole`` is the forward for everywhere else; in its code, ``rotary`` names the rotary function."""
        self._whole, self._rotary = whole, rotary
        self._splits: dict[Any, Split | None] = {}
        # transformers reads a forward's annotations.
        self.__annotations__ = whole.__annotations__

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        context, inputs = context_of(module), _flat((*args, *kwargs.values()))
        hidden = args[0] if args else kwargs.get("hidden_states")
        if context is None or module.training or torch.is_grad_enabled() or not isinstance(hidden, Tensor):
            return self._whole(module, *args, **kwargs)
        if hidden.dim() != 3 or not context.has_place(hidden.shape[1]) or not _tensors(inputs):
            return self._whole(module, *args, **kwargs)
        key = tuple(map(_kind, args)), tuple((name, _kind(value)) for name, value in kwargs.items())
        if key not in self._splits:
            self._splits[key] = self._split(module, args, kwargs)
        parts = self._splits[key]
        result = None if parts is None else _run(parts, module, context, inputs, hidden.shape[:2])
        return self._whole(module, *args, **kwargs) if result is None else (result, None)

    def _split(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Split | None:
        try:
            return split(module, self._whole, self._rotary, args, kwargs)
        except Untraceable as reason:
            _tell(f"keys and values are copied to where peers read them: {reason}")
            return None


def _run(
    parts: Split, module: nn.Module, context: AttentionContext, inputs: list[Tensor], size: Sequence[int]
) -> Tensor | None:
    """The attention's result; None, and nothing done, where its keys and values are not of one shape."""
    k_BKlD, v, *more = parts.keys_values(*inputs)
    turn, kept = (_turn(more[:2]), more[2:]) if parts.k_turns else (None, more)
    (batch, length), (_, kv_heads, _, head_dim) = size, k_BKlD.shape
    product = parts.value_product
    fits = v.shape == k_BKlD.shape if product is None else product.weight_NW.shape[1] == kv_heads * head_dim
    if not fits or (parts.k_turns and turn is None):
        return None
    with context.place(batch, length, kv_heads, head_dim, k_BKlD) as place:
        _write(k_BKlD, place.k, turn)
        if product is None:
            _write(v, place.v)
        else:
            _project(product, v, place.v, head_dim)
        del k_BKlD, v, more  # parts of a projection that nothing needs while attention runs
        place.start()
        out_BlHD = _attend(parts, module, inputs, kept, place)
    (result,) = parts.after(out_BlHD, *inputs)
    assert isinstance(result, Tensor)
    return result


def _attend(parts: Split, module: nn.Module, inputs: list[Tensor], kept: list[Any], place: Place) -> Tensor:
    q_BHlD, *more = parts.queries(*inputs, *kept)
    kept.clear()
    options = parts.options | {name: inputs[i] for name, i in parts.given_options.items()}
    q_shape = [q_BHlD.shape[i] for i in (0, 2, 1, 3)]
    context, spec, sinks_H = asked(module, q_shape, q_shape, None, options)
    _write(q_BHlD, place.q, (more[0], more[1]) if parts.q_turns else None)
    del q_BHlD, more
    return context.attend_at(place, spec, sinks_H)


def _write(x_BHlD: Tensor, parts: list[HeadPart], turn: Turn | None = None) -> None:
    if x_BHlD.stride(-1) != 1:
        x_BHlD = x_BHlD.contiguous()
    for heads, memory in parts:
        rowwise.put(x_BHlD[:, heads], memory, turn)


def _project(product: Product, x: Tensor, targets: list[HeadPart], head_dim: int) -> None:
    """v's projection of ``x``: by the product itself where the target is whole memory, and else by way of memory."""
    heads, memory = targets[0]
    if heads == slice(None) and memory.is_contiguous():
        product.into(x, memory.flatten(2))
    else:
        _write(product.module(x).unflatten(-1, (-1, head_dim)).transpose(1, 2), targets)


def _turn(given: Sequence[Tensor]) -> Turn | None:
    """(cos, sin) of the usual form, or None."""
    cos, sin = given
    usual = cos.dim() == sin.dim() == 3 and cos.stride(-1) == sin.stride(-1) == 1
    return (cos, sin) if usual else None


def _flat(values: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        found += _flat(value) if isinstance(value, tuple) else [] if is_constant(value) else [value]
    return found


def _tensors(values: Sequence[Any]) -> bool:
    """A cache, for one, is none: what is done to it cannot be cut in parts."""
    return all(isinstance(value, Tensor) for value in values)


def _kind(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_kind, value))
    return value if is_constant(value) else "given"


@cache
def _tell(text: str) -> None:
    """Once."""
    log.info("%s", text)
