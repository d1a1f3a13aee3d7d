"""Where q, k and v are inside the result of one fused projection, and what other ranks can read of it in place.

Other ranks read the result as the projection wrote it: nothing is copied together for them. A rank of the ring reads
tokens of k and v. A rank of the Ulysses group reads the columns of its heads. Copy engines do the reading; one copy
takes rows of one width at one distance.
"""

# Shapes: B batch, T tokens on this rank, L tokens of all ranks, W columns, H query heads, K key/value heads, h a rank's
# part of the query heads, D head_dim.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ds_ring.transport.peer_memory import rows_of
from ds_ring.transport.shared import ViewOf


@dataclass(frozen=True)
class QKVLayout:
    """Views of a contiguous tensor [B, T, W]: the result of one projection. Only their shapes and strides are used.

    Attributes:
        shape: (B, T, W) of the whole tensor.
        q_BTHD: None where q is not one of its views.
    """

    shape: tuple[int, int, int]
    k_BTKD: Tensor
    v_BTKD: Tensor
    q_BTHD: Tensor | None

    def kv_view(self) -> ViewOf | None:
        """k and v as one view [2, B, T, K, D] of the whole tensor; None where their strides differ, v comes before k,
        or their elements are not rows at one distance."""
        k_BTKD, v_BTKD = self.k_BTKD, self.v_BTKD
        apart, alike = v_BTKD.storage_offset() - k_BTKD.storage_offset(), k_BTKD.shape == v_BTKD.shape
        if not alike or k_BTKD.stride() != v_BTKD.stride() or apart <= 0 or rows_of(k_BTKD) is None:
            return None
        return ViewOf(self.shape, (int(apart), *k_BTKD.stride()), int(k_BTKD.storage_offset()))

    def columns_by_rank(self, heads: Sequence[tuple[Sequence[int], Sequence[int]]]) -> ColumnsByRank | None:
        """The columns that each rank reads; None where its heads are not whole ranges of columns.

        Args:
            heads: for each rank, the numbers of its query heads and of its key/value heads.
        """
        if self.q_BTHD is None:
            return None
        views = (self.q_BTHD, self.k_BTKD, self.v_BTKD)
        found = [columns for q, kv in heads if (columns := self._columns_of(views, (q, kv, kv))) is not None]
        return ColumnsByRank(self.shape, found) if len(found) == len(heads) else None

    def _columns_of(self, views: tuple[Tensor, ...], heads: tuple[Sequence[int], ...]) -> RankColumns | None:
        _, length, width = self.shape
        parts, stops, head_dim = [], [], views[0].shape[3]
        for view, own in zip(views, heads, strict=True):
            neighbours = list(own) == list(range(own[0], own[0] + len(own)))
            if not neighbours or view.shape[3] != head_dim:
                return None
            if view.stride()[:2] != (length * width, width) or view.stride(3) != 1:
                return None
            stride, first = int(view.stride(2)), int(view.storage_offset() + own[0] * view.stride(2))
            parts.append(HeadColumns(0, first, len(own), stride))
            stops.append(first + (len(own) - 1) * stride + head_dim)
        low, high = min(part.first for part in parts), max(stops)
        if high - low == head_dim * sum(part.heads for part in parts):
            # The rank's q, k and v heads are all there is between the first column and the last: one range.
            moved = [HeadColumns(0, part.first - low, part.heads, part.stride) for part in parts]
            return RankColumns((slice(low, high),), tuple(moved), head_dim)
        if any(stop - part.first != head_dim * part.heads for part, stop in zip(parts, stops, strict=True)):
            return None
        ranges = tuple(slice(part.first, stop) for part, stop in zip(parts, stops, strict=True))
        return RankColumns(ranges, tuple(HeadColumns(n, 0, p.heads, p.stride) for n, p in enumerate(parts)), head_dim)


@dataclass(frozen=True)
class ColumnsByRank:
    """What every rank of a Ulysses group reads of a tensor of ``shape``, [B, T, W]."""

    shape: tuple[int, int, int]
    by_rank: list[RankColumns]


@dataclass(frozen=True)
class HeadColumns:
    """Where some heads are in a rank's ranges of columns.

    Attributes:
        range_index: which of the ranges.
        first: the first head's first column, counted from the start of that range.
        heads: how many.
        stride: columns from one head to the next.
    """

    range_index: int
    first: int
    heads: int
    stride: int


@dataclass(frozen=True)
class RankColumns:
    """One rank's columns of a projection.

    Attributes:
        ranges: one range of columns, or one each for q, k and v.
        parts: where the heads of q, of k and of v are in them.
    """

    ranges: tuple[slice, ...]
    parts: tuple[HeadColumns, ...]
    head_dim: int

    def views(self, received: Sequence[Tensor]) -> list[Tensor]:
        """q [B, L, h, D], k and v of what was received, a contiguous tensor [B, L, *] for each of ``ranges``."""
        found = []
        for part in self.parts:
            columns = received[part.range_index]
            size = (*columns.shape[:2], part.heads, self.head_dim)
            strides = (*columns.stride()[:2], part.stride, 1)
            found.append(columns.as_strided(size, strides, columns.storage_offset() + part.first))
        return found
