"""Rewriting a layer's graph: which neighbours become one.

- an up-projection and its tanh GELU: the GELU into the product;
- an activation times another projection: one pass;
- two summands and the norm of their sum: one pass;
- a projection added to a sum: the sum into the product, whose bias was added to the sum before.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.nn.functional import dropout

from ds_ring.fusion.modules import AddLinear, AddNorm, Gated, LinearGelu, Sum
from ds_ring.fusion.recognize import Norm, activation_of
from ds_ring.hf.linear import Linear

_ADD = (operator.add, torch.add)
_MULTIPLY = (operator.mul, torch.mul)


class Rewriter:
    """``graph`` and the ``modules`` that it names are changed in place; ``done`` counts what was fused, by name."""

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module], gelu_inside: bool) -> None:
        self.graph, self.modules, self.done = graph, modules, Counter[str]()
        self._gelu_inside = gelu_inside
        self._kept = {node for node in graph.nodes if not node.users or node.op == "placeholder"}

    def run(self) -> None:
        for rewrite in (self._drop_dropout, self._activation, self._add_norm, self._add_product):
            for node in list(self.graph.nodes):
                rewrite(node)
            # What the model calls for its effect alone stays.
            self.graph.eliminate_dead_code(is_impure_node=lambda node: node in self._kept)

    def _module(self, node: Any) -> nn.Module | None:
        return self.modules[str(node.target)] if isinstance(node, fx.Node) and node.op == "call_module" else None

    def _product(self, node: Any) -> Linear | None:
        """The product that ``node`` is, where nothing but one other node uses it."""
        module = self._module(node)
        alone = module is not None and len(node.users) == 1 and len(node.args) == 1 and not node.kwargs
        return Linear.of(module) if module is not None and alone else None

    def _insert(self, before: fx.Node, part: nn.Module, args: tuple[fx.Node, ...]) -> fx.Node:
        name = f"fused_{len(self.modules)}"
        self.modules[name] = part
        self.done[type(part).__name__] += 1
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
        kind, source = activation_of(module), _operand(node, 0)
        if kind is None:
            return
        user = next(iter(node.users), None)
        if len(node.users) == 1 and user is not None and _is(user, _MULTIPLY) and user.args[0] is not user.args[1]:
            up = _operand(user, 1 if user.args[0] is node else 0)
            user.replace_all_uses_with(self._insert(user, Gated(kind), (source, up)))
        elif kind == "gelu_tanh" and self._gelu_inside and (product := self._product(source)) is not None:
            part = self._insert(node, LinearGelu(product), (_operand(source, 0),))
            node.replace_all_uses_with(part)

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

    def _add_product(self, node: fx.Node) -> None:
        if not _is(node, _ADD) or (len(node.users) == 1 and _is(next(iter(node.users)), _ADD)):
            return  # no sum, or part of a larger one
        terms = _terms(node)
        products = [(term, p) for term in terms if (p := self._product(term)) is not None]
        if len(terms) < 2 or not products:
            return
        last, product = products[-1]
        rest = tuple(term for term in terms if term is not last)
        owner = self._sum_of(rest[0]) if len(rest) == 1 and len(rest[0].users) == 1 else None
        if owner is not None:
            owner.fold_bias_of(product)
            total = rest[0]
        else:
            total = self._insert(node, Sum(product), rest)
        node.replace_all_uses_with(self._insert(node, AddLinear(product), (total, _operand(last, 0))))

    def _sum_of(self, node: fx.Node) -> AddNorm | None:
        """The part whose sum ``node`` is."""
        if node.op == "call_function" and node.target is operator.getitem and node.args[1] == 0:
            part = self._module(node.args[0])
            return part if isinstance(part, AddNorm) and part.fold is None else None
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
    """The summands of ``node``, those of inner sums that nothing else uses among them."""
    found: list[fx.Node] = []
    for operand in (_operand(node, 0), _operand(node, 1)):
        inner = _is(operand, _ADD) and len(operand.users) == 1
        found += _terms(operand) if inner else [operand]
    return found
