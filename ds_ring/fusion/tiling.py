"""Running what treats every token alike in blocks of rows, so that its intermediates exist for a block at a time.

An MLP's intermediate is four times as wide as a token, a fused projection three times: with 500,000 tokens of the
paper's model on a rank 32 GB and 25 GB in fp16, in blocks of 65,536 rows 4 and 3.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from ds_ring.fusion.modules import AddLinear, AddNorm, FusedModule, Gated, LinearGelu, Sum
from ds_ring.fusion.recognize import Norm, activation_of
from ds_ring.hf.linear import Linear

At = tuple[slice, slice]
"""Sequences and tokens of [B, T, ...]."""
WHOLE: At = (slice(None), slice(None))

_FUNCTIONS = (operator.add, operator.mul, torch.add, torch.mul)
_METHODS = ("view", "reshape", "transpose", "chunk", "split", "contiguous", "size")
"""Among those of a projection's result, which keep its tokens apart."""


def blocks(batch: int, length: int, limit: int) -> list[At]:
    """[B, T] in the fewest blocks of at most ``limit`` rows, sizes as equal as can be; 0: one block.

    Each is whole memory of a contiguous tensor: some sequences, or a part of one.
    """
    if not limit or batch * length <= limit:
        return [WHOLE]
    if length <= limit:
        return [(rows, slice(None)) for rows in _equal(batch, limit // length)]
    return [(slice(b, b + 1), tokens) for b in range(batch) for tokens in _equal(length, limit)]


def _equal(n: int, limit: int) -> list[slice]:
    count = -(-n // limit)
    edges = [n * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


class TiledTail(FusedModule):
    """A graph of one result, in blocks of at most ``limit`` rows.

    Attributes:
        over: number of the input that the result is written over, where there are several blocks and it has the
            result's form; None: memory of its own. A block's rows are read before they are written.
    """

    graph: nn.Module
    limit: int
    over: int | None

    def __init__(self, graph: nn.Module, limit: int, over: int | None) -> None:
        super().__init__()
        self._holds(graph=graph, limit=limit, over=over)

    def forward(self, *inputs: Tensor) -> Tensor:
        """[B, T, W] of inputs [B, T, *]."""
        at = [WHOLE]
        if all(x.dim() == 3 for x in inputs):
            at = blocks(inputs[0].shape[0], inputs[0].shape[1], self.limit)
        return in_blocks(self.graph, inputs, at, None if self.over is None else inputs[self.over])


def in_blocks(graph: nn.Module, inputs: Sequence[Tensor], at: Sequence[At], over: Tensor | None = None) -> Tensor:
    """``graph`` of all ``inputs``, block by block where there are several."""
    if len(at) == 1:
        whole: Tensor = graph(*inputs)
        return whole
    batch, length = inputs[0].shape[:2]
    result: Tensor | None = None
    for block in at:
        part: Tensor = graph(*(cut(x, block, batch, length) for x in inputs))
        if result is None:
            shape = (batch, length, *part.shape[2:])
            fits = over is not None and (over.shape, over.dtype) == (shape, part.dtype) and over.is_contiguous()
            result = over if fits else part.new_empty(shape)
        assert result is not None
        result[block] = part
        del part  # or it would live beside the next one
    assert result is not None
    return result


def cut(x: Tensor, at: At, batch: int, length: int) -> Tensor:
    """A block of what has a value for each token, shared by all sequences or not; anything else as it is."""
    if at is WHOLE or x.dim() < 2 or x.shape[1] != length or x.shape[0] not in (1, batch):
        return x
    return x[at if x.shape[0] == batch else (slice(None), at[1])]


def tile_tail(graph: fx.Graph, modules: dict[str, nn.Module], limit: int, in_place: bool) -> bool:
    """Put what a layer does behind its attention into ``TiledTail``; False where it is not token by token to the end,
    or holds no product. ``graph`` and ``modules`` are changed in place.

    With ``in_place`` the result is written over what the layer was given. Then nobody may need that any more; the
    tensor stays, so that whoever holds it, as transformers' decoders do with the embedding, holds no memory beside.
    """
    *nodes, output = graph.nodes
    tail: set[fx.Node] = set()
    for node in reversed(nodes):
        if (
            node.op != "placeholder"
            and _token_wise(node, modules)
            and all(u in tail or u is output for u in node.users)
        ):
            tail.add(node)
    # One of several results comes from where they are made.
    tail = {node for node in tail if node.target is not operator.getitem or node.args[0] in tail}
    results = [node for node in tail if output in node.users]
    inside = [node for node in nodes if node in tail]
    if len(results) != 1 or not any(_multiplies(node, modules) for node in inside):
        return False
    inputs = list(dict.fromkeys(a for node in inside for a in node.all_input_nodes if a not in tail))
    part = subgraph(graph, inputs, results, modules, single=True)
    name = f"fused_{len(modules)}"
    given = [i for i, node in enumerate(inputs) if node.op == "placeholder"]
    modules[name] = TiledTail(part, limit, given[0] if in_place and len(given) == 1 else None)
    with graph.inserting_before(output):
        replacement = graph.create_node("call_module", name, tuple(inputs))
    results[0].replace_all_uses_with(replacement)
    for node in reversed(inside):
        graph.erase_node(node)
    return True


def subgraph(
    graph: fx.Graph,
    takes: Sequence[fx.Node],
    gives: Sequence[fx.Node],
    modules: dict[str, nn.Module],
    single: bool = False,
) -> nn.Module:
    """What computes ``gives`` from ``takes``: a tuple, or with ``single`` the one tensor."""
    wanted, part = needed(gives, takes), fx.Graph()
    copies = {node: part.placeholder(node.name) for node in takes}
    for node in graph.nodes:
        if node in wanted:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(copies[gives[0]] if single else tuple(copies[node] for node in gives))
    return fx.GraphModule(modules, part)


def needed(outputs: Sequence[fx.Node], given: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes that ``outputs`` are computed by, from ``given``."""
    found: set[fx.Node] = set()
    waiting = list(outputs)
    while waiting:
        node = waiting.pop()
        if node not in found and node not in given:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def keeps_tokens_apart(node: fx.Node, modules: dict[str, nn.Module], functions: Sequence[Any]) -> bool:
    """Whether a node of an attention's projections treats every token alike."""
    if node.op == "call_method":
        return node.target in _METHODS
    if node.op == "call_module":
        return _alike(modules[str(node.target)])
    return node.target in (operator.getitem, *functions)


def _token_wise(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return _alike(modules[str(node.target)])
    if node.op == "call_method":
        # A gate and what it gates, out of one projection.
        return node.target == "chunk" and (*node.args[2:], *node.kwargs.values()) == (-1,)
    return node.op == "call_function" and node.target in (operator.getitem, *_FUNCTIONS)


def _alike(module: nn.Module) -> bool:
    if isinstance(module, (AddNorm, AddLinear, Gated, LinearGelu, Sum)):
        return True
    return Linear.of(module) is not None or Norm.of(module) is not None or activation_of(module) is not None


def _multiplies(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    module = modules[str(node.target)] if node.op == "call_module" else None
    return isinstance(module, (AddLinear, LinearGelu)) or (module is not None and Linear.of(module) is not None)
