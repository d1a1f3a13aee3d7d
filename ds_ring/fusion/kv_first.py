"""An attention module's forward that writes keys, values and queries where they belong, keys and values first.

Where peers read this layer's keys and values, they are rotated and projected into the memory that peers read, a fused
projection as a whole, and set out while queries are still being made. Where there are more rows than run at a time,
projections and rotation go block by block into the same place, on one rank too. Anywhere else the module runs as it is.
"""

# Shapes: B batch, T tokens, H query heads, K key/value heads, D head_dim.
from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ds_ring.attention.qkv_buffers import ALL, QKVBuffers
from ds_ring.attention.qkv_layout import QKVLayout
from ds_ring.attention.spec import AttentionSpec
from ds_ring.attention.ulysses import HeadSlice
from ds_ring.fusion.attention_graphs import Projection, Split, split
from ds_ring.fusion.symbolic_trace import Untraceable, is_constant
from ds_ring.fusion.tiling import WHOLE, At, blocks, cut, in_blocks
from ds_ring.hf.attention import asked
from ds_ring.hf.attention_context import AttentionContext, context_of
from ds_ring.hf.linear import Linear
from ds_ring.kernels import elementwise
from ds_ring.kernels.elementwise import CosSin

log = logging.getLogger("ds_ring")


class KVFirstForward:
    """Called as the bound forward of one module."""

    def __init__(self, whole: FunctionType, in_place: FunctionType, rotary: str) -> None:
        """``whole`` is the forward for everywhere else, ``in_place`` the same where queries and keys may turn in the
        memory they lie in; in their code, ``rotary`` names the rotary function."""
        self._whole, self._in_place, self._rotary = whole, in_place, rotary
        self._splits: dict[Any, Split | Untraceable] = {}
        # transformers reads a forward's annotations.
        self.__annotations__ = whole.__annotations__

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        context, inputs = context_of(module), _flat((*args, *kwargs.values()))
        hidden = args[0] if args else kwargs.get("hidden_states")
        if context is None or module.training or torch.is_grad_enabled() or not isinstance(hidden, Tensor):
            return self._whole(module, *args, **kwargs)
        if hidden.dim() != 3 or not _tensors(inputs):
            return self._whole(module, *args, **kwargs)
        parts = self._split(module, args, kwargs)
        if context.has_qkv_buffers(*hidden.shape[:2]):
            if isinstance(parts, Split):
                result = _Run(parts, module, context, inputs, (hidden.shape[0], hidden.shape[1])).result()
                if result is not None:
                    return result, None
            else:
                _tell(f"keys and values are copied to where peers read them: {parts}")
        alone = isinstance(parts, Split) and parts.q_rotates and parts.q_alone and parts.k_rotates and parts.k_alone
        return (self._in_place if alone else self._whole)(module, *args, **kwargs)

    def _split(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Split | Untraceable:
        key = tuple(map(_kind, args)), tuple((name, _kind(value)) for name, value in kwargs.items())
        if key not in self._splits:
            try:
                self._splits[key] = split(module, self._whole, self._rotary, args, kwargs)
            except Untraceable as reason:
                self._splits[key] = Untraceable(str(reason))  # without the frames that it came through
        return self._splits[key]


class _Run:
    """One forward of one module."""

    def __init__(
        self, parts: Split, module: nn.Module, context: AttentionContext, inputs: list[Tensor], size: tuple[int, int]
    ) -> None:
        self._parts, self._module, self._context, self._inputs, self._size = parts, module, context, inputs, size
        self._buffers: QKVBuffers | None = None
        self._asked: tuple[AttentionSpec, Tensor | None] | None = None
        # Blocks without queries yet, with what those need of the making of keys and values. Nothing else may hold
        # that: it is a whole projection, and must be gone when attention runs.
        self._waiting: deque[tuple[At, list[Any]]] = deque()

    def result(self) -> Tensor | None:
        """[B, T, d]; None, and nothing done, where keys and values are not of one shape or turn in an unusual way."""
        parts, at = self._parts, blocks(*self._size, self._context.block_rows)
        if not parts.token_wise:
            at = [WHOLE]
        with ExitStack() as opened:
            for block in at:
                if not self._keys_values(block, opened):
                    return None
                if parts.fused and len(at) > 1:
                    self._queries()
            assert self._buffers is not None
            self._buffers.start()
            while self._waiting:
                self._queries()
            assert self._asked is not None
            out_BTHD = self._context.attend_buffers(self._buffers, *self._asked)
            self._buffers = None
        return in_blocks(parts.after, [out_BTHD, *self._inputs], at)

    def _given(self, block: At) -> list[Tensor]:
        return [cut(x, block, *self._size) for x in self._inputs]

    def _keys_values(self, block: At, opened: ExitStack) -> bool:
        """A block of them where they belong; False, and nothing done, where they do not."""
        parts = self._parts
        if block is WHOLE and self._projected(opened):
            return True
        k_BKTD, v, *more = parts.keys_values(*self._given(block))
        cos_sin, kept = self._cos_sin_of_keys(more)
        _, kv_heads, _, head_dim = k_BKTD.shape
        product = parts.value_linear
        if self._buffers is None:
            fits = v.shape == k_BKTD.shape if product is None else product.weight_NW.shape[1] == kv_heads * head_dim
            if not fits or (parts.k_rotates and cos_sin is None):
                return False
            like = k_BKTD.new_empty(0)  # an open place holds on to it
            self._buffers = opened.enter_context(self._context.qkv_buffers(*self._size, kv_heads, head_dim, like))
        _write(k_BKTD, self._buffers.k, block, cos_sin)
        if product is None:
            _write(v, self._buffers.v, block)
        else:
            _project(product, v, self._buffers.v, block, head_dim)
        self._waiting.append((block, kept))
        return True

    def _projected(self, opened: ExitStack) -> bool:
        """Keys, values and what else the same product makes, into memory that peers read, where keys turn; False, and
        nothing done, where that cannot be."""
        projection = self._parts.projection
        if projection is None:
            return False
        x = projection.given(*self._inputs)
        shape = (*self._size, projection.product.weight_NW.shape[1])
        qkv_layout, cos_sin = self._qkv_layout_in(projection, x.new_empty(shape, device="meta"))
        projected = self._context.projection_views(qkv_layout)
        if projected is None or (self._parts.k_rotates and cos_sin is None):
            return False
        kv_heads, head_dim = qkv_layout.k_BTKD.shape[2:]
        like = x.new_empty(0)  # an open place holds on to it
        self._buffers = opened.enter_context(
            self._context.qkv_buffers(*self._size, kv_heads, head_dim, like, projected)
        )
        assert self._buffers.memory is not None
        projection.product.into(x, self._buffers.memory)
        k_BKTD, _, *more = projection.parts(*self._inputs, self._buffers.memory)
        if cos_sin is not None:
            elementwise.rotate_(k_BKTD, cos_sin)
        self._waiting.append((WHOLE, self._cos_sin_of_keys(more)[1]))
        return True

    def _qkv_layout_in(self, projection: Projection, whole: Tensor) -> tuple[QKVLayout, CosSin | None]:
        """How the parts of ``whole`` lie in it, by an operation on none of its numbers; how keys turn."""
        k_BKTD, v_BKTD, *more = projection.parts(*self._inputs, whole)
        cos_sin, kept = self._cos_sin_of_keys(more)
        q_BHTD = self._parts.queries(*self._given(WHOLE), *kept)[0] if projection.holds_q else None
        views = (k_BKTD.transpose(1, 2), v_BKTD.transpose(1, 2), None if q_BHTD is None else q_BHTD.transpose(1, 2))
        return QKVLayout((whole.shape[0], whole.shape[1], whole.shape[2]), *views), cos_sin

    def _cos_sin_of_keys(self, more: list[Any]) -> tuple[CosSin | None, list[Any]]:
        """How keys still turn, and what queries need, of what comes with keys and values."""
        return (_cos_sin(more[:2]), more[2:]) if self._parts.k_rotates else (None, more)

    def _queries(self) -> None:
        parts, (block, kept) = self._parts, self._waiting.popleft()
        q_BHTD, *cos_sin = parts.queries(*self._given(block), *kept)
        if self._asked is None:
            options = parts.options | {name: self._inputs[i] for name, i in parts.given_options.items()}
            q_shape = *self._size, q_BHTD.shape[1], q_BHTD.shape[3]
            _, spec, sinks_H = asked(self._module, q_shape, q_shape, None, options)
            self._asked = spec, sinks_H
        assert self._buffers is not None
        how = (cos_sin[0], cos_sin[1]) if parts.q_rotates else None
        if block is WHOLE and parts.q_alone and q_BHTD.stride(-1) == 1 and self._buffers.takes_q:
            self._buffers.take_q((q_BHTD if how is None else elementwise.rotate_(q_BHTD, how)).transpose(1, 2))
        else:
            _write(q_BHTD, self._buffers.q, block, how)


def _write(x_BHTD: Tensor, parts: list[HeadSlice], at: At, cos_sin: CosSin | None = None) -> None:
    if x_BHTD.stride(-1) != 1:
        x_BHTD = x_BHTD.contiguous()
    for heads, memory in parts:
        elementwise.put(x_BHTD[:, heads], memory[at], cos_sin)


def _project(product: Linear, x: Tensor, parts: list[HeadSlice], at: At, head_dim: int) -> None:
    """v's projection of ``x``: by the product itself where it belongs in whole memory, and else by way of memory."""
    heads, memory = parts[0]
    if heads == ALL and memory[at].is_contiguous():
        product.into(x, memory[at].flatten(2))
    else:
        _write(product.module(x).unflatten(-1, (-1, head_dim)).transpose(1, 2), parts, at)


def _cos_sin(given: Sequence[Tensor]) -> CosSin | None:
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
