"""Rewriting of a layer's graph: which neighbouring operations become one.

- An up-projection and its tanh GELU: one matrix product that applies the GELU (``LinearGelu``).
- An activation times another projection: one pass over memory (``Gated``).
- Two summands and the norm of their sum: one pass (``AddNorm``).
- A projection added to a sum: one matrix product that adds the sum (``AddLinear``). The projection's bias was added to
  the sum before, in the pass that made it (``AddNorm``, ``Sum``).
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.nn.functional import dropout

from ds_ring.fusion.modules import AddLinear, AddNorm, FusedOp, Gated, LinearGelu, Sum
from ds_ring.fusion.recognize import Norm, activation_of
from ds_ring.hf.linear import Linear

_ADD = (operator.add, torch.add)
_MULTIPLY = (operator.mul, torch.mul)


class Rewriter:
    """Changes ``graph`` and the ``modules`` that it names in place.

    Attributes:
        done: how often each fused operation was put in, by name.
    """

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module], gelu_inside: bool) -> None:
        self.graph, self.modules, self.done = graph, modules, Counter[str]()
        self._gelu_inside = gelu_inside
        self._kept = {node for node in graph.nodes if not node.users or node.op == "placeholder"}

    def run(self) -> None:
        for rewrite in (self._drop_dropout, self._activation, self._add_norm, self._add_linear):
            for node in list(self.graph.nodes):
                rewrite(node)
            # What the model calls for its effect alone stays.
            self.graph.eliminate_dead_code(is_impure_node=lambda node: node in self._kept)

    def _module(self, node: Any) -> nn.Module | None:
        return self.modules[str(node.target)] if isinstance(node, fx.Node) and node.op == "call_module" else None

    def _linear(self, node: Any) -> Linear | None:
        """The linear layer that ``node`` is, where one other node uses its result."""
        module = self._module(node)
        one_user = module is not None and len(node.users) == 1 and len(node.args) == 1 and not node.kwargs
        return Linear.of(module) if module is not None and one_user else None

    def _insert(self, before: fx.Node, op: FusedOp, args: tuple[fx.Node, ...]) -> fx.Node:
        name = f"fused_{len(self.modules)}"
        self.modules[name] = op
        self.done[type(op).__name__] += 1
        with self.graph.inserting_before(before):
            return self.graph.create_node("call_module", name, args)

    def _drop_dropout(self, node: fx.Node) -> None:
        """Layers run in evaluation mode only."""
        if type(self._module(node)) is nn.Dropout or (node.op == "call_function" and node.target is dropout):
            node.replace_all_uses_with(_operand(node, 0))

    def _activation(self, node: fx.Node) -> None:
        module = self._module(node)
        if module is None or len(node.args) != 1 or node.kwargs:
            return
        activation, source = activation_of(module), _operand(node, 0)
        if activation is None:
            return
        user = next(iter(node.users), None)
        if len(node.users) == 1 and user is not None and _is(user, _MULTIPLY) and user.args[0] is not user.args[1]:
            up = _operand(user, 1 if user.args[0] is node else 0)
            user.replace_all_uses_with(self._insert(user, Gated(activation), (source, up)))
        elif activation == "gelu_tanh" and self._gelu_inside and (linear := self._linear(source)) is not None:
            node.replace_all_uses_with(self._insert(node, LinearGelu(linear), (_operand(source, 0),)))

    def _add_norm(self, node: fx.Node) -> None:
        if not _is(node, _ADD):
            return
        found = [(user, n) for user in node.users if (m := self._module(user)) is not None and (n := Norm.of(m))]
        if len(found) != 1 or len(found[0][0].args) != 1:
            return
        user, norm = found[0]
        both = self._insert(node, AddNorm(norm), (_operand(node, 0), _operand(node, 1)))
        with self.graph.inserting_before(node):
            total, normed = (self.graph.create_node("call_function", operator.getitem, (both, i)) for i in (0, 1))
        user.replace_all_uses_with(normed)
        node.replace_all_uses_with(total)

    def _add_linear(self, node: fx.Node) -> None:
        if not _is(node, _ADD) or (len(node.users) == 1 and _is(next(iter(node.users)), _ADD)):
            return  # no sum, or part of a larger one
        terms = _terms(node)
        linears = [(term, found) for term in terms if (found := self._linear(term)) is not None]
        if len(terms) < 2 or not linears:
            return
        last, linear = linears[-1]
        rest = tuple(term for term in terms if term is not last)
        owner = self._sum_of(rest[0]) if len(rest) == 1 and len(rest[0].users) == 1 else None
        if owner is not None:
            owner.fold_bias_of(linear)
            total = rest[0]
        else:
            total = self._insert(node, Sum(linear), rest)
        node.replace_all_uses_with(self._insert(node, AddLinear(linear), (total, _operand(last, 0))))

    def _sum_of(self, node: fx.Node) -> AddNorm | None:
        """The ``AddNorm`` that makes the sum ``node``, where no bias was folded into it yet."""
        if node.op == "call_function" and node.target is operator.getitem and node.args[1] == 0:
            op = self._module(node.args[0])
            return op if isinstance(op, AddNorm) and op.fold is None else None
        return None


def _is(node: fx.Node, functions: tuple[Any, ...]) -> bool:
    """Whether ``node`` is one of ``functions`` of two other nodes."""
    nodes = len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args)
    return node.op == "call_function" and node.target in functions and nodes and not node.kwargs


def _operand(node: fx.Node, index: int) -> fx.Node:
    operand = node.args[index]
    assert isinstance(operand, fx.Node)
    return operand


def _terms(node: fx.Node) -> list[fx.Node]:
    """The summands of ``node``, with the summands of inner sums that nothing else uses."""
    found: list[fx.Node] = []
    for operand in (_operand(node, 0), _operand(node, 1)):
        inner = _is(operand, _ADD) and len(operand.users) == 1
        found += _terms(operand) if inner else [operand]
    return found
