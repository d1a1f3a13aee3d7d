"""The plan of one attention module's q, k and v in one forward: all that the fused path has to know of them.

``plan_qkv`` decides it, once a forward, before anything is computed. ``kv_first.py`` then executes the plan.
"""

# Shapes: B batch, T tokens on this rank, H query heads, K key/value heads, D head_dim, W columns of a projection.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_ring.attention.qkv_buffers import Destination, ProjectionViews
from ds_ring.attention.qkv_layout import QKVLayout
from ds_ring.fusion.attention_graphs import AttentionGraphs
from ds_ring.fusion.tiling import WHOLE, Tile, token_tiles
from ds_ring.hf.attention_context import AttentionContext


@dataclass(frozen=True)
class QKVPlan:
    """Where q, k and v are made, and how.

    Attributes:
        destination: where q, k and v are written. With own_memory the module's own forward makes them.
        tiles: the tiles of tokens that projections run on, one after the other.
        projection: one fused projection writes q, k and v into the buffer at once, and other ranks read these views of
            its result. None: k and v are written to the buffer one by one.
        rotate_k, rotate_q: k, q comes out of its graph unrotated; it is rotated when it is written, or in place.
        k_in_place, q_in_place: k, q stays in the memory that its projection wrote, and is rotated there.
        q_by_tile: each tile's q is made right after the tile's k and v, before the next tile. Where q is made from the
            same result, that result is then held for one tile only. False: q is made when k and v of all tiles are in
            transfer.
    """

    destination: Destination
    tiles: tuple[Tile, ...] = (WHOLE,)
    projection: ProjectionViews | None = None
    rotate_k: bool = False
    rotate_q: bool = False
    k_in_place: bool = False
    q_in_place: bool = False
    q_by_tile: bool = False


def plan_qkv(
    graphs: AttentionGraphs, context: AttentionContext, inputs: Sequence[Tensor], size: tuple[int, int]
) -> QKVPlan:
    """The plan for one forward of the module that ``graphs`` were cut from.

    Args:
        inputs: of the forward, as ``AttentionGraphs`` counts them.
        size: sequences and tokens on this rank.
    """
    destination = context.qkv_destination(*size)
    rotations = [rotation for rotation in (graphs.k_rotation, graphs.q_rotation) if rotation is not None]
    if destination == "own_memory" or not all(_is_usual(inputs[i]) for rotation in rotations for i in rotation):
        in_place = len(rotations) == 2 and graphs.k_in_place and graphs.q_in_place
        return QKVPlan("own_memory", k_in_place=in_place, q_in_place=in_place)
    tiles = token_tiles(*size, context.tile_tokens) if graphs.token_wise else [WHOLE]
    whole = len(tiles) == 1
    projection = _projection_views(graphs, context, inputs, size) if whole else None
    # A ring's q is in memory of its own. In a Ulysses buffer it is in place only where its projection is.
    q_may_stay = destination == "ring_buffer" or projection is not None
    return QKVPlan(
        destination,
        tuple(tiles),
        projection,
        rotate_k=graphs.k_rotation is not None,
        rotate_q=graphs.q_rotation is not None,
        k_in_place=projection is not None,
        q_in_place=whole and graphs.q_in_place and q_may_stay,
        q_by_tile=not whole and graphs.shares_projection,
    )


def _is_usual(cos_or_sin: Tensor) -> bool:
    """[B or 1, T, R] with a contiguous last dimension: what ``kernels/elementwise.py`` takes."""
    return cos_or_sin.dim() == 3 and cos_or_sin.stride(-1) == 1


def _projection_views(
    graphs: AttentionGraphs, context: AttentionContext, inputs: Sequence[Tensor], size: tuple[int, int]
) -> ProjectionViews | None:
    """What other ranks would read of the module's fused projection; None where there is none, or they cannot."""
    fused = graphs.fused
    if fused is None:
        return None
    # The graphs make views of the result: on the meta device nothing is computed.
    result_BTW = torch.empty((*size, fused.linear.weight_NW.shape[1]), device="meta")
    k_BKTD, v_BKTD, *kept = fused.views(*inputs, result_BTW)
    q_BHTD = graphs.queries(*inputs, *kept) if fused.holds_q else None
    q_BTHD = None if q_BHTD is None else q_BHTD.transpose(1, 2)
    layout = QKVLayout((*size, result_BTW.shape[2]), k_BKTD.transpose(1, 2), v_BKTD.transpose(1, 2), q_BTHD)
    return context.projection_views(layout)
