"""Running operations that treat every token alike on tiles of tokens, so that an intermediate exists for one tile only.

The intermediate of an MLP is four times as wide as a token, a fused projection three times. With 500,000 tokens of the
paper's model on a rank they take 32 GB and 25 GB in fp16; in tiles of 65,536 tokens 4 GB and 3 GB. The configuration's
``workload.block_tokens`` is the size of a tile.
"""

# Shapes: B batch, T tokens, W columns.
from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, fx, nn

from ds_ring.fusion.modules import FusedOp
from ds_ring.fusion.subgraph import subgraph
from ds_ring.fusion.token_wise import is_linear, is_token_wise

Tile = tuple[slice, slice]
"""Sequences and tokens of a tensor [B, T, ...]."""
WHOLE: Tile = (slice(None), slice(None))


def token_tiles(batch: int, length: int, limit: int) -> list[Tile]:
    """[B, T] in the fewest tiles of at most ``limit`` tokens, sizes as equal as can be; 0: one tile, ``WHOLE``.

    Each tile is contiguous in a contiguous tensor: some whole sequences, or a part of one.
    """
    if not limit or batch * length <= limit:
        return [WHOLE]
    if length <= limit:
        return [(sequences, slice(None)) for sequences in _equal(batch, limit // length)]
    return [(slice(b, b + 1), tokens) for b in range(batch) for tokens in _equal(length, limit)]


def _equal(n: int, limit: int) -> list[slice]:
    count = -(-n // limit)
    edges = [n * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


class TiledTail(FusedOp):
    """A graph of one result, in tiles of at most ``limit`` tokens.

    Attributes:
        over: number of the input that the result is written over, where there are several tiles and the input has the
            result's shape and dtype; None: the result gets new memory. The tokens of a tile are read before they are
            written.
    """

    graph: nn.Module
    limit: int
    over: int | None

    def __init__(self, graph: nn.Module, limit: int, over: int | None) -> None:
        super().__init__()
        self._hold(graph=graph, limit=limit, over=over)

    def forward(self, *inputs: Tensor) -> Tensor:
        """[B, T, W] of inputs [B, T, *]."""
        tiles = [WHOLE]
        if all(x.dim() == 3 for x in inputs):
            tiles = token_tiles(inputs[0].shape[0], inputs[0].shape[1], self.limit)
        return in_tiles(self.graph, inputs, tiles, None if self.over is None else inputs[self.over])


def in_tiles(graph: nn.Module, inputs: Sequence[Tensor], tiles: Sequence[Tile], over: Tensor | None = None) -> Tensor:
    """``graph`` of all ``inputs``, tile by tile where there are several; the result [B, T, ...].

    Args:
        over: an input that the result is written over, where their shapes and dtypes allow it.
    """
    if len(tiles) == 1:
        whole: Tensor = graph(*inputs)
        return whole
    batch, length = inputs[0].shape[:2]
    result: Tensor | None = None
    for tile in tiles:
        part: Tensor = graph(*(cut_tile(x, tile, batch, length) for x in inputs))
        if result is None:
            shape = (batch, length, *part.shape[2:])
            fits = over is not None and (over.shape, over.dtype) == (shape, part.dtype) and over.is_contiguous()
            result = over if fits else part.new_empty(shape)
        assert result is not None
        result[tile] = part
        del part  # else it would be held beside the next one
    assert result is not None
    return result


def cut_tile(x: Tensor, tile: Tile, batch: int, length: int) -> Tensor:
    """A tile of a tensor that has a value for each token, [batch or 1, length, ...]; any other tensor as it is."""
    if tile is WHOLE or x.dim() < 2 or x.shape[1] != length or x.shape[0] not in (1, batch):
        return x
    return x[tile if x.shape[0] == batch else (slice(None), tile[1])]


def tile_tail(graph: fx.Graph, modules: dict[str, nn.Module], limit: int, in_place: bool) -> bool:
    """Move what a layer does after its attention into a ``TiledTail``; ``graph`` and ``modules`` change in place.

    Args:
        in_place: the result may be written over the layer's input, which nobody may need any more. The tensor object
            stays, so that whoever holds it, as transformers' decoders hold the embedding, holds no other memory.

    Returns:
        False, and nothing changes, where the layer does not end token by token, or that end holds no linear layer.
    """
    *nodes, output = graph.nodes
    tail: set[fx.Node] = set()
    for node in reversed(nodes):
        users_inside = all(u in tail or u is output for u in node.users)
        if node.op != "placeholder" and is_token_wise(node, modules) and users_inside:
            tail.add(node)
    # One of several results stays with the operation that makes them.
    tail = {node for node in tail if node.target is not operator.getitem or node.args[0] in tail}
    results = [node for node in tail if output in node.users]
    inside = [node for node in nodes if node in tail]
    if len(results) != 1 or not any(is_linear(node, modules) for node in inside):
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
