"""An attention module's forward on the fused path: first k and v, in the buffers that other ranks read, then q.

k and v are projected and rotated into the buffers, a fused projection as a whole, and are in transfer while q is still
being made. Where a rank has more tokens than projections run at a time, the same goes tile by tile, on a single rank
too. ``qkv_plan.py`` says how in each forward. Where it says own memory, the module runs its own forward, which ends in
the attention function of ``hf/attention.py``.
"""

# Shapes: B batch, T tokens, H query heads, K key/value heads, D head_dim, d hidden size.
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
from ds_ring.attention.spec import AttentionSpec
from ds_ring.attention.ulysses import HeadBuffer
from ds_ring.fusion.attention_graphs import AttentionGraphs, Rotation, cut_at_attention
from ds_ring.fusion.qkv_plan import QKVPlan, plan_qkv
from ds_ring.fusion.symbolic_trace import Untraceable, is_constant
from ds_ring.fusion.tiling import WHOLE, Tile, cut_tile, in_tiles
from ds_ring.hf.attention import check_call
from ds_ring.hf.attention_context import AttentionContext, context_of
from ds_ring.hf.linear import Linear
from ds_ring.kernels import elementwise
from ds_ring.kernels.elementwise import CosSin

log = logging.getLogger("ds_ring")


class KVFirstForward:
    """Called as the bound forward of one attention module."""

    def __init__(self, own: FunctionType, own_in_place: FunctionType, rotary: str) -> None:
        """
        Args:
            own: the module's own forward, for everything that is not planned otherwise.
            own_in_place: the same, with q and k rotated in the memory that their projections wrote.
            rotary: what the rotary function is called in the forward's code.
        """
        self._own, self._own_in_place, self._rotary = own, own_in_place, rotary
        self._graphs: dict[Any, AttentionGraphs | Untraceable] = {}
        # transformers reads a forward's annotations.
        self.__annotations__ = own.__annotations__

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        context, inputs = context_of(module), _flat((*args, *kwargs.values()))
        hidden = args[0] if args else kwargs.get("hidden_states")
        if context is None or module.training or torch.is_grad_enabled() or not isinstance(hidden, Tensor):
            return self._own(module, *args, **kwargs)
        # A cache among the arguments is no tensor: what a forward does to it cannot be cut.
        if hidden.dim() != 3 or not all(isinstance(x, Tensor) for x in inputs):
            return self._own(module, *args, **kwargs)
        graphs, size = self._graphs_of(module, args, kwargs), (hidden.shape[0], hidden.shape[1])
        if isinstance(graphs, Untraceable):
            if context.qkv_destination(*size) != "own_memory":
                _log_once(f"keys and values are copied to where other ranks read them: {graphs}")
            return self._own(module, *args, **kwargs)
        plan = plan_qkv(graphs, context, inputs, size)
        if plan.destination != "own_memory":
            result_BTd = _BufferedForward(plan, graphs, module, context, inputs, size).result()
            if result_BTd is not None:
                return result_BTd, None
        in_place = plan.destination == "own_memory" and plan.k_in_place and plan.q_in_place
        return (self._own_in_place if in_place else self._own)(module, *args, **kwargs)

    def _graphs_of(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AttentionGraphs | Untraceable:
        """For calls like this one: with the same arguments that are constants."""
        key = tuple(map(_constants, args)), tuple((name, _constants(value)) for name, value in kwargs.items())
        if key not in self._graphs:
            try:
                self._graphs[key] = cut_at_attention(module, self._own, self._rotary, args, kwargs)
            except Untraceable as reason:
                self._graphs[key] = Untraceable(str(reason))  # without the frames of its traceback
        return self._graphs[key]


class _BufferedForward:
    """One forward of one module whose q, k and v are made in buffers, as ``plan`` says."""

    def __init__(
        self,
        plan: QKVPlan,
        graphs: AttentionGraphs,
        module: nn.Module,
        context: AttentionContext,
        inputs: list[Tensor],
        size: tuple[int, int],
    ) -> None:
        self._plan, self._graphs, self._module, self._context = plan, graphs, module, context
        self._inputs, self._size = inputs, size
        self._buffers: QKVBuffers | None = None
        self._spec_sinks: tuple[AttentionSpec, Tensor | None] | None = None
        # Tiles without q yet, with what q needs of the making of k and v. Nothing else may hold that: it is a whole
        # projection, and must be freed before the attention runs.
        self._waiting: deque[tuple[Tile, list[Any]]] = deque()

    def result(self) -> Tensor | None:
        """[B, T, d]; None, and nothing done, where v is not of k's shape. The module's own forward refuses that."""
        plan = self._plan
        with ExitStack() as opened:
            if plan.projection is not None:
                self._run_fused_projection(opened)
            else:
                for tile in plan.tiles:
                    if not self._make_keys_values(tile, opened):
                        return None
                    if plan.q_by_tile:
                        self._make_queries()
            assert self._buffers is not None
            self._buffers.start()
            while self._waiting:
                self._make_queries()
            assert self._spec_sinks is not None
            out_BTHD = self._context.attend_buffers(self._buffers, *self._spec_sinks)
            self._buffers = None
        return in_tiles(self._graphs.after, [out_BTHD, *self._inputs], plan.tiles)

    def _run_fused_projection(self, opened: ExitStack) -> None:
        """q, k and v into the buffer by one linear layer; k is rotated there."""
        fused, projection = self._graphs.fused, self._plan.projection
        assert fused is not None
        assert projection is not None
        x = fused.linear_input(*self._inputs)
        like = x.new_empty(0)  # an open buffer holds on to it
        self._buffers = opened.enter_context(
            self._context.qkv_buffers(*self._size, projection.num_kv_heads, projection.head_dim, like, projection)
        )
        assert self._buffers.memory is not None
        fused.linear.into(x, self._buffers.memory)
        k_BKTD, _, *kept = fused.views(*self._inputs, self._buffers.memory)
        if self._plan.rotate_k:
            elementwise.rotate_(k_BKTD, self._cos_sin(self._graphs.k_rotation, WHOLE))
        self._waiting.append((WHOLE, kept))

    def _make_keys_values(self, tile: Tile, opened: ExitStack) -> bool:
        """A tile of k and v into the buffers; False, and nothing done, where v is not of k's shape."""
        graphs = self._graphs
        k_BKTD, v, *kept = graphs.keys_values(*self._cut(tile))
        _, kv_heads, _, head_dim = k_BKTD.shape
        value_linear = graphs.value_linear
        if self._buffers is None:
            if value_linear is None:
                alike = v.shape == k_BKTD.shape
            else:
                alike = value_linear.weight_NW.shape[1] == kv_heads * head_dim
            if not alike:
                return False
            like = k_BKTD.new_empty(0)  # an open buffer holds on to it
            self._buffers = opened.enter_context(self._context.qkv_buffers(*self._size, kv_heads, head_dim, like))
        _write(k_BKTD, self._buffers.k, tile, self._cos_sin(graphs.k_rotation, tile) if self._plan.rotate_k else None)
        if value_linear is None:
            _write(v, self._buffers.v, tile)
        else:
            _project(value_linear, v, self._buffers.v, tile, head_dim)
        self._waiting.append((tile, kept))
        return True

    def _make_queries(self) -> None:
        """The q of the first tile that has none yet."""
        plan, graphs, (tile, kept) = self._plan, self._graphs, self._waiting.popleft()
        q_BHTD = graphs.queries(*self._cut(tile), *kept)
        if self._spec_sinks is None:
            q_shape = *self._size, q_BHTD.shape[1], q_BHTD.shape[3]
            _, spec, sinks_H = check_call(self._module, q_shape, q_shape, None, graphs.options_of(self._inputs))
            self._spec_sinks = spec, sinks_H
        assert self._buffers is not None
        cos_sin = self._cos_sin(graphs.q_rotation, tile) if plan.rotate_q else None
        if plan.q_in_place and q_BHTD.stride(-1) == 1:
            self._buffers.take_q((q_BHTD if cos_sin is None else elementwise.rotate_(q_BHTD, cos_sin)).transpose(1, 2))
        else:
            _write(q_BHTD, self._buffers.q, tile, cos_sin)

    def _cut(self, tile: Tile) -> list[Tensor]:
        return [cut_tile(x, tile, *self._size) for x in self._inputs]

    def _cos_sin(self, rotation: Rotation | None, tile: Tile) -> CosSin:
        assert rotation is not None
        cos, sin = (cut_tile(self._inputs[i], tile, *self._size) for i in rotation)
        return cos, sin


def _write(x_BHTD: Tensor, buffers: list[HeadBuffer], tile: Tile, cos_sin: CosSin | None = None) -> None:
    if x_BHTD.stride(-1) != 1:
        x_BHTD = x_BHTD.contiguous()
    for heads, buffer in buffers:
        elementwise.put(x_BHTD[:, heads], buffer[tile], cos_sin)


def _project(linear: Linear, x: Tensor, buffers: list[HeadBuffer], tile: Tile, head_dim: int) -> None:
    """v, the linear layer's result, into the buffers: written there by the linear layer itself where the buffer is
    contiguous and takes all heads, else copied."""
    heads, buffer = buffers[0]
    if heads == ALL and buffer[tile].is_contiguous():
        linear.into(x, buffer[tile].flatten(2))
    else:
        _write(linear.module(x).unflatten(-1, (-1, head_dim)).transpose(1, 2), buffers, tile)


def _flat(values: Sequence[Any]) -> list[Any]:
    """What is no constant, tuples flattened, in order."""
    found: list[Any] = []
    for value in values:
        found += _flat(value) if isinstance(value, tuple) else [] if is_constant(value) else [value]
    return found


def _constants(value: Any) -> Any:
    """``value`` with all that is no constant replaced: a key that says how a forward is called."""
    if isinstance(value, tuple):
        return tuple(map(_constants, value))
    return value if is_constant(value) else "given"


@cache
def _log_once(text: str) -> None:
    log.info("%s", text)
