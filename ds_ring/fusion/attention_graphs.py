"""An attention module's forward, cut in three graphs: what k and v need, what q needs besides, what follows attention.

transformers' attention forwards compute all three projections, call the attention function, and project its result. As
one function, k and v cannot be sent to other ranks before q is there, and are made in memory that other ranks do not
read. So the forward is recorded (``record_attention.py``), and its graph is cut at the attention.

``AttentionGraphs`` say what can be done with a module's q, k and v. What is done with them in one forward is in
``qkv_plan.py``.
"""

# Shapes: B batch, T tokens, H query heads, K key/value heads, D head_dim, d hidden size, W columns of a projection.
from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.proxy import Proxy

from ds_ring.fusion.recognize import Norm
from ds_ring.fusion.record_attention import RecordedAttention, record_attention
from ds_ring.fusion.subgraph import needed, subgraph
from ds_ring.fusion.symbolic_trace import Untraceable
from ds_ring.fusion.token_wise import is_token_wise_in_attention
from ds_ring.hf.linear import Linear
from ds_ring.kernels import elementwise

_SPLITS = ("chunk", "split")
_VIEWS = ("view", "transpose")

Rotation = tuple[int, int]
"""Numbers of the inputs that are cos and sin."""


@dataclass(frozen=True)
class FusedProjection:
    """One linear layer that makes k and v, and q where ``holds_q``, as views of its result.

    Attributes:
        linear_input: (*inputs) -> the linear layer's input.
        views: (*inputs, the linear layer's result) -> as ``AttentionGraphs.keys_values``. It computes nothing with the
            elements of k and v, nor of q where ``holds_q``.
    """

    linear: Linear
    linear_input: nn.Module
    views: nn.Module
    holds_q: bool


@dataclass(frozen=True)
class AttentionGraphs:
    """The three graphs. ``inputs`` are the tensors that the forward is given, tuples flattened, in order.

    Attributes:
        keys_values: (*inputs) -> (k [B, K, T, D], v likewise, *kept); kept is what ``queries`` needs of it.
        queries: (*inputs, *kept) -> q [B, H, T, D].
        after: (out [B, T, H, D], *inputs) -> result [B, T, d].
        k_rotation, q_rotation: k, q come out of the graphs as they are before rotation; None: as attention needs them.
        k_in_place, q_in_place: nothing else reads the memory of k, of q, which may be rotated in place.
        shares_projection: q is made from a result that k and v are made from as well, and that is held until then.
        token_wise: all three graphs treat every token alike, so that they may run in tiles of tokens.
        value_linear: the linear layer that makes v of all heads; ``keys_values`` then gives its input in place of v.
        fused: the one linear layer that k and v, before rotation, are views of, and that nothing else reads.
        options: keyword arguments of the attention function.
        input_options: those that are inputs: their numbers.
    """

    keys_values: nn.Module
    queries: nn.Module
    after: nn.Module
    k_rotation: Rotation | None
    q_rotation: Rotation | None
    k_in_place: bool
    q_in_place: bool
    shares_projection: bool
    token_wise: bool
    value_linear: Linear | None
    fused: FusedProjection | None
    options: dict[str, Any]
    input_options: dict[str, int]

    def options_of(self, inputs: Sequence[Tensor]) -> dict[str, Any]:
        """The attention function's keyword arguments in a forward with these inputs."""
        return self.options | {name: inputs[i] for name, i in self.input_options.items()}


def cut_at_attention(
    module: nn.Module, forward: FunctionType, rotary: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AttentionGraphs:
    """The graphs of ``forward`` of ``module``; arguments as for ``record_attention``.

    Raises:
        Untraceable: the forward does something else than three projections, rotation, attention and a projection.
    """
    recorded = record_attention(module, forward, rotary, args, kwargs)
    graph, inputs, modules = recorded.graph, recorded.inputs, recorded.modules
    q, k, v = recorded.qkv
    (q, q_rotation), (k, k_rotation) = _before_rotation(q, inputs), _before_rotation(k, inputs)
    value = _value_linear(v, modules)
    if value is not None:
        v, value_linear = value
    for_kv, for_q = needed([k, v], inputs), needed([q], inputs)
    # Of the nodes that make k and v: q itself, or what q is computed from.
    border = {q}.union(*(node.all_input_nodes for node in for_q - for_kv))
    kept = [node for node in graph.nodes if node in for_kv and node in border]
    follows = needed([recorded.result], [*inputs, recorded.attention])
    if any(node in for_kv | for_q and node.target != "size" for node in follows):
        raise Untraceable(f"{recorded.name}: what follows the attention needs what went before it")
    options, input_options = _options(recorded)
    gives = [k, v, *kept]
    return AttentionGraphs(
        keys_values=subgraph(graph, inputs, gives, modules),
        queries=subgraph(graph, [*inputs, *kept], [q], modules, single=True),
        after=subgraph(graph, [recorded.attention, *inputs], [recorded.result], modules, single=True),
        k_rotation=k_rotation,
        q_rotation=q_rotation,
        k_in_place=_sole_maker(k, modules) is not None,
        q_in_place=_sole_maker(q, modules) is not None,
        shares_projection=any(node.target != "size" for node in kept),
        token_wise=all(
            is_token_wise_in_attention(node, modules, [elementwise.rotated]) for node in for_kv | for_q | follows
        ),
        value_linear=None if value is None else value_linear,
        fused=_fused_projection(recorded, gives, q),
        options=options,
        input_options=input_options,
    )


def _options(recorded: RecordedAttention) -> tuple[dict[str, Any], dict[str, int]]:
    options, input_options = {}, {}
    for key, value in recorded.options.items():
        if isinstance(value, Proxy):
            if value.node not in recorded.inputs:
                raise Untraceable(f"{recorded.name}: it computes {key}")
            input_options[key] = recorded.inputs.index(value.node)
        else:
            options[key] = value
    return options, input_options


def _before_rotation(node: fx.Node, inputs: list[fx.Node]) -> tuple[fx.Node, Rotation | None]:
    """(what is rotated last of all, by which inputs); (node, None) where rotation does not come last."""
    if node.target is elementwise.rotated and len(node.users) == 1:
        x, *cos_sin = (operand for operand in node.args if isinstance(operand, fx.Node))
        if len(cos_sin) == 2 and all(operand in inputs for operand in cos_sin):
            return x, (inputs.index(cos_sin[0]), inputs.index(cos_sin[1]))
    return node, None


def _fused_projection(recorded: RecordedAttention, gives: list[fx.Node], q: fx.Node) -> FusedProjection | None:
    """``gives``: k, v and what ``queries`` needs."""
    graph, inputs, modules = recorded.graph, recorded.inputs, recorded.modules
    k_maker, v_maker = (_sole_maker(node, modules) for node in gives[:2])
    if k_maker is None or k_maker is not v_maker:
        return None
    linear, x = Linear.of(modules[str(k_maker.target)]), k_maker.args[0]
    if linear is None or linear.parallel == "row_parallel" or not isinstance(x, fx.Node):
        return None
    linear_input = subgraph(graph, inputs, [x], modules, single=True)
    views = subgraph(graph, [*inputs, k_maker], gives, modules)
    return FusedProjection(linear, linear_input, views, _sole_maker(q, modules) is k_maker)


def _sole_maker(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The call of a linear layer or norm whose result ``node`` is, or is a view of; None where there is none, or where
    something else reads that memory."""
    while True:
        readers = [user for user in node.users if user.target != "size"]
        if node.target in _SPLITS:
            # The pieces are disjoint: who reads another piece does not matter.
            if len({user.args[1] for user in readers if user.target is operator.getitem}) != len(readers):
                return None
        elif len(readers) != 1:
            return None
        if node.op == "call_module":
            module = modules[str(node.target)]
            return node if Linear.of(module) is not None or Norm.of(module) is not None else None
        if node.target not in (*_SPLITS, *_VIEWS, operator.getitem) or not isinstance(node.args[0], fx.Node):
            return None
        if node.target is operator.getitem and node.args[0].target not in _SPLITS:
            return None
        node = node.args[0]


def _value_linear(v: fx.Node, modules: dict[str, nn.Module]) -> tuple[fx.Node, Linear] | None:
    """(its input, the linear layer) where ``v`` is a linear layer's result, viewed as heads; else None."""
    if v.target != "transpose" or v.args[1:] != (1, 2):
        return None
    view = v.args[0]
    if not isinstance(view, fx.Node) or view.target != "view" or not isinstance(view.args[0], fx.Node):
        return None
    made = view.args[0]
    if made.op != "call_module" or any(len(node.users) != 1 for node in (v, view, made)):
        return None
    linear, x = Linear.of(modules[str(made.target)]), made.args[0]
    if linear is None or linear.parallel == "row_parallel" or not isinstance(x, fx.Node):
        return None
    return x, linear
