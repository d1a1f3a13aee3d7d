"""Parts of a graph as modules of their own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn


def subgraph(
    graph: fx.Graph,
    inputs: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    modules: dict[str, nn.Module],
    single: bool = False,
) -> nn.Module:
    """The module that computes ``outputs`` from ``inputs``.

    Args:
        modules: the submodules that the graph's nodes name.
        single: it returns the one output instead of a tuple.
    """
    wanted, part = needed(outputs, inputs), fx.Graph()
    copies = {node: part.placeholder(node.name) for node in inputs}
    for node in graph.nodes:
        if node in wanted:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(copies[outputs[0]] if single else tuple(copies[node] for node in outputs))
    return fx.GraphModule(modules, part)


def needed(outputs: Sequence[fx.Node], inputs: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes that compute ``outputs`` from ``inputs``."""
    found: set[fx.Node] = set()
    waiting = list(outputs)
    while waiting:
        node = waiting.pop()
        if node not in found and node not in inputs:
            found.add(node)
            waiting += node.all_input_nodes
    return found
