"""An attention module's forward as a graph, with its rotary function and its call of the attention function recorded.

The forward runs once on proxies (``symbolic_trace.py``). Two names of its modelling file are bound to recorders: the
table of attention functions, and the rotary function.
"""

# Shapes: B batch, T tokens, H query heads, K key/value heads, D head_dim, d hidden size.
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import fx, nn
from torch.fx.proxy import GraphAppendingTracer, Proxy

from ds_ring.fusion.symbolic_trace import Untraceable, holds_tensors, is_constant, skeleton_of
from ds_ring.kernels import elementwise

INTERFACES = "ALL_ATTENTION_FUNCTIONS"
"""What modelling files of transformers call the table of attention functions."""


@dataclass(frozen=True)
class RecordedAttention:
    """One forward of an attention module.

    Attributes:
        name: of the module's class, for errors.
        modules: the submodules that the graph's nodes name.
        inputs: the tensors that the forward is given, tuples flattened, in order.
        qkv: q [B, H, T, D], k [B, K, T, D] and v as the attention function gets them.
        options: its keyword arguments, proxies among them.
        attention: the call, [B, T, H, D].
        result: of the forward, [B, T, d].
    """

    name: str
    graph: fx.Graph
    modules: dict[str, nn.Module]
    inputs: list[fx.Node]
    qkv: tuple[fx.Node, fx.Node, fx.Node]
    options: dict[str, Any]
    attention: fx.Node
    result: fx.Node


def record_attention(
    module: nn.Module, forward: FunctionType, rotary: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> RecordedAttention:
    """``forward`` of ``module`` when it is called with ``args`` and ``kwargs``.

    Args:
        rotary: the global name of the function that ``elementwise.rotate`` computes.

    Raises:
        Untraceable: the forward depends on values, uses a parameter of its own, or does not call one attention function
            without a mask.
    """
    name = type(module).__name__
    if INTERFACES not in forward.__globals__:
        raise Untraceable(f"{name} does not ask for {INTERFACES}")
    graph = fx.Graph()
    tracer = GraphAppendingTracer(graph)
    recorder = _Recorder(graph, tracer)
    names = {**forward.__globals__, INTERFACES: recorder, rotary: recorder.rotate}
    recorded = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    recorded.__kwdefaults__ = forward.__kwdefaults__
    modules: dict[str, nn.Module] = {}
    inputs: list[fx.Node] = []

    def proxy(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(proxy, value))
        if is_constant(value):
            return value
        inputs.append(graph.placeholder(f"input_{len(inputs)}"))
        return _Proxy3d(inputs[-1], tracer)

    given = [proxy(value) for value in args], {name: proxy(value) for name, value in kwargs.items()}
    try:
        out = recorded(skeleton_of(module, "", tracer, modules), *given[0], **given[1])
        result = out[0].node
    except Exception as error:  # whatever a model's code raises when it is not given tensors
        raise Untraceable(f"{name}: {type(error).__name__}: {error}") from error
    if recorder.attention is None or tuple(out[1:]) != (None,) or holds_tensors(graph):
        raise Untraceable(f"{name}: no attention between projections")
    return RecordedAttention(name, graph, modules, inputs, recorder.qkv, recorder.options, recorder.attention, result)


class _Recorder:
    """Stands for the table of attention functions, and records their one call."""

    def __init__(self, graph: fx.Graph, tracer: GraphAppendingTracer) -> None:
        self._graph, self._tracer = graph, tracer
        self.attention: fx.Node | None = None
        self.qkv: tuple[fx.Node, fx.Node, fx.Node]
        self.options: dict[str, Any] = {}

    def get_interface(self, name: str, default: Any) -> Callable[..., Any]:
        """What modelling files call of the table."""
        return self._attend

    def _attend(self, module: Any, q: Proxy, k: Proxy, v: Proxy, mask: Any, **options: Any) -> tuple[Proxy, None]:
        if self.attention is not None or mask is not None:
            raise Untraceable("it attends twice, or with a mask")
        self.qkv, self.options = (q.node, k.node, v.node), options
        self.attention = self._graph.create_node("call_function", _attention, self.qkv)
        return Proxy(self.attention, self._tracer), None

    def rotate(self, q: Proxy, k: Proxy, cos: Proxy, sin: Proxy) -> tuple[Proxy, Proxy]:
        return self._rotated(q, cos, sin), self._rotated(k, cos, sin)

    def _rotated(self, x: Proxy, cos: Proxy, sin: Proxy) -> Proxy:
        proxy: Proxy = self._tracer.create_proxy("call_function", elementwise.rotated, (x, cos, sin), {})
        return proxy


def _attention(*_: Any) -> None:
    """Stands in the graph for the attention; never called."""


class _Proxy3d(Proxy):
    """An input of three dimensions, whose forward may unpack its shape."""

    @property
    def shape(self) -> tuple[Any, ...]:
        return tuple(self.size(i) for i in range(3))
