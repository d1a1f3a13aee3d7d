"""An attention module's forward in three: what keys and values need, what queries need besides, what follows.

transformers' attention forwards compute all three projections, call the attention interface, and project its result.
Run as one, keys and values cannot set out before queries are there, and are made in memory that is not where peers
read them. So the forward is run once on proxies (``symbolic_trace.py``), with the rotary function and the attention
interface recorded, and its graph is cut at the attention.
"""

# Shapes: B batch, T tokens, H query heads, K key/value heads, D head_dim, d hidden size.
from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import fx, nn
from torch.fx.proxy import GraphAppendingTracer, Proxy

from ds_ring.fusion.recognize import Norm
from ds_ring.fusion.symbolic_trace import Untraceable, holds_tensors, is_constant, skeleton_of
from ds_ring.fusion.tiling import keeps_tokens_apart, needed, subgraph
from ds_ring.hf.linear import Linear
from ds_ring.kernels import elementwise

_PARTS = ("chunk", "split")
_VIEWS = ("view", "transpose")

INTERFACES = "ALL_ATTENTION_FUNCTIONS"
"""What modelling files of transformers call the table of attention functions."""


@dataclass(frozen=True)
class Projection:
    """A product in three steps. ``given``: (*inputs) -> what is multiplied. ``parts``: (*inputs, the product) -> as
    ``Split.keys_values``, without an operation on k and v; ``holds_q``: nor is there one on q, a part of it as well."""

    product: Linear
    given: nn.Module
    parts: nn.Module
    holds_q: bool


@dataclass(frozen=True)
class Split:
    """The three graphs. ``inputs`` are the tensors that the forward is given, tuples flattened, in order.

    Attributes:
        keys_values: (*inputs) -> (k [B, K, T, D], v likewise, cos and sin where k still has to turn, *kept).
        queries: (*inputs, *kept) -> (q [B, H, T, D], cos and sin where q still has to turn).
        after: (out [B, T, H, D], *inputs) -> result [B, T, d].
        k_turns, q_turns: whether the rotation is left to whoever writes them where they belong.
        q_alone, k_alone: whether nothing else reads the memory in which they lie before they turn.
        projection: the one product that k and v, before they turn, are parts of, and that nothing else reads.
        fused: queries come out of what keys and values come out of, which is held until they are made.
        token_wise: all three treat every token alike, so that they may run in blocks of rows.
        value_product: the projection that v is, heads apart; ``keys_values`` then gives its input in place of v.
        options: what the attention interface is asked for; ``given_options`` are numbers of inputs.
    """

    keys_values: nn.Module
    queries: nn.Module
    after: nn.Module
    k_rotates: bool
    q_rotates: bool
    q_alone: bool
    k_alone: bool
    fused: bool
    token_wise: bool
    value_linear: Linear | None
    projection: Projection | None
    options: dict[str, Any]
    given_options: dict[str, int]


@dataclass
class _Recorded:
    """The one call of the attention interface."""

    graph: fx.Graph
    tracer: GraphAppendingTracer
    out: fx.Node | None = None
    qkv: tuple[fx.Node, ...] = ()
    options: dict[str, Any] | None = None

    def attend(self, module: Any, q: Proxy, k: Proxy, v: Proxy, mask: Any, **options: Any) -> tuple[Proxy, None]:
        if self.out is not None or mask is not None:
            raise Untraceable("it attends twice, or with a mask")
        self.out = self.graph.create_node("call_function", _attention, (q.node, k.node, v.node))
        self.qkv, self.options = (q.node, k.node, v.node), options
        return Proxy(self.out, self.tracer), None

    # What modelling files ask of the table.
    def get_interface(self, name: str, default: Any) -> Callable[..., Any]:
        return self.attend

    def rotate(self, q: Proxy, k: Proxy, cos: Proxy, sin: Proxy) -> tuple[Proxy, Proxy]:
        return self._rotated(q, cos, sin), self._rotated(k, cos, sin)

    def _rotated(self, x: Proxy, cos: Proxy, sin: Proxy) -> Proxy:
        proxy: Proxy = self.tracer.create_proxy("call_function", elementwise.rotated, (x, cos, sin), {})
        return proxy


class _Shaped(Proxy):
    """Of three dimensions, and asked for them."""

    @property
    def shape(self) -> tuple[Any, ...]:
        return tuple(self.size(i) for i in range(3))


def split(
    module: nn.Module, forward: FunctionType, rotary: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Split:
    """``forward`` of ``module``, in which ``rotary`` is the name of a function that ``rowwise.rotate`` computes.

    Raises:
        Untraceable: it does something else than three projections, rotation, attention and a projection.
    """
    if INTERFACES not in forward.__globals__:
        raise Untraceable(f"{type(module).__name__} does not ask for {INTERFACES}")
    graph = fx.Graph()
    tracer = GraphAppendingTracer(graph)
    recorded = _Recorded(graph, tracer)
    names = {**forward.__globals__, INTERFACES: recorded, rotary: recorded.rotate}
    run = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    run.__kwdefaults__ = forward.__kwdefaults__
    modules: dict[str, nn.Module] = {}
    inputs: list[fx.Node] = []

    def proxy(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(proxy, value))
        if is_constant(value):
            return value
        inputs.append(graph.placeholder(f"input_{len(inputs)}"))
        return _Shaped(inputs[-1], tracer)

    given = [proxy(value) for value in args], {name: proxy(value) for name, value in kwargs.items()}
    try:
        out = run(skeleton_of(module, "", tracer, modules), *given[0], **given[1])
        result = out[0].node
    except Exception as error:  # whatever a model's code raises when it is not given tensors
        raise Untraceable(f"{type(module).__name__}: {type(error).__name__}: {error}") from error
    if recorded.out is None or tuple(out[1:]) != (None,) or holds_tensors(graph):
        raise Untraceable(f"{type(module).__name__}: no attention between projections")
    return _cut(recorded, inputs, result, modules, type(module).__name__)


def _cut(
    recorded: _Recorded, inputs: list[fx.Node], result: fx.Node, modules: dict[str, nn.Module], name: str
) -> Split:
    q, k, v = recorded.qkv
    (q, *q_cos_sin), (k, *k_cos_sin) = _before_rotation(q), _before_rotation(k)
    product = _linear_of(v, modules)
    if product is not None:
        v, value_linear = product
    first = [k, v, *k_cos_sin]
    before, both = needed(first, inputs), needed([q, *q_cos_sin], inputs)
    # Of what keys and values computed, what queries are, or are computed by.
    border = {q, *q_cos_sin}.union(*(node.all_input_nodes for node in both - before))
    kept = [node for node in recorded.graph.nodes if node in before and node in border]
    assert recorded.out is not None
    behind = needed([result], [*inputs, recorded.out])
    if any(node in before | both and node.target != "size" for node in behind):
        raise Untraceable(f"{name}: what follows the attention needs what went before it")
    options, given = {}, {}
    for key, value in (recorded.options or {}).items():
        if isinstance(value, Proxy):
            if value.node not in inputs:
                raise Untraceable(f"{name}: it computes {key}")
            given[key] = inputs.index(value.node)
        else:
            options[key] = value

    graph = recorded.graph
    return Split(
        keys_values=subgraph(graph, inputs, [*first, *kept], modules),
        queries=subgraph(graph, [*inputs, *kept], [q, *q_cos_sin], modules),
        after=subgraph(graph, [recorded.out, *inputs], [result], modules, single=True),
        k_rotates=bool(k_cos_sin),
        q_rotates=bool(q_cos_sin),
        q_alone=_maker(q, modules) is not None,
        k_alone=_maker(k, modules) is not None,
        fused=any(node.target != "size" for node in kept),
        token_wise=all(keeps_tokens_apart(n, modules, [elementwise.rotated]) for n in before | both | behind),
        value_linear=value_linear if product is not None else None,
        projection=_projection(recorded.graph, inputs, [*first, *kept], q, modules),
        options=options,
        given_options=given,
    )


def _attention(*_: Any) -> None:
    """Stands in a graph for the attention, at which the graph is cut."""


def _before_rotation(node: fx.Node) -> list[fx.Node]:
    """[what turns, cos, sin], or [node] where it does not turn last of all."""
    last = node.target is elementwise.rotated and len(node.users) == 1
    return [a for a in node.args if isinstance(a, fx.Node)] if last else [node]


def _projection(
    graph: fx.Graph, inputs: list[fx.Node], gives: list[fx.Node], q: fx.Node, modules: dict[str, nn.Module]
) -> Projection | None:
    """``gives``: k, v and what goes with them."""
    makers = [_maker(node, modules) for node in gives[:2]]
    made = makers[0]
    if made is None or made is not makers[1]:
        return None
    product, x = Linear.of(modules[str(made.target)]), made.args[0]
    if product is None or product.split == "in" or not isinstance(x, fx.Node):
        return None
    given = subgraph(graph, inputs, [x], modules, single=True)
    return Projection(product, given, subgraph(graph, [*inputs, made], gives, modules), _maker(q, modules) is made)


def _maker(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The submodule's call of which ``node`` is the result, or a part of it, where only its one user reads that; None
    where it is anything else."""
    while True:
        readers = [user for user in node.users if user.target != "size"]
        if node.target in _PARTS:
            # Parts are disjoint; what is made of the others is their own affair.
            if len({user.args[1] for user in readers if user.target is operator.getitem}) != len(readers):
                return None
        elif len(readers) != 1:
            return None
        if node.op == "call_module":
            module = modules[str(node.target)]
            return node if Linear.of(module) is not None or Norm.of(module) is not None else None
        if node.target not in (*_PARTS, *_VIEWS, operator.getitem) or not isinstance(node.args[0], fx.Node):
            return None
        if node.target is operator.getitem and node.args[0].target not in _PARTS:
            return None
        node = node.args[0]


def _linear_of(v: fx.Node, modules: dict[str, nn.Module]) -> tuple[fx.Node, Linear] | None:
    """The input of the projection that ``v`` is, seen as heads, and that projection."""
    if v.target != "transpose" or v.args[1:] != (1, 2):
        return None
    seen = v.args[0]
    if not isinstance(seen, fx.Node) or seen.target != "view" or not isinstance(seen.args[0], fx.Node):
        return None
    made = seen.args[0]
    if made.op != "call_module" or any(len(node.users) != 1 for node in (v, seen, made)):
        return None
    product, x = Linear.of(modules[str(made.target)]), made.args[0]
    return (x, product) if product is not None and product.split != "in" and isinstance(x, fx.Node) else None
