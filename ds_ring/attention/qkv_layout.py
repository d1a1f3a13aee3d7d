"""Queries, keys and values where one projection has made them: what peers may take of it as it lies.

Nothing is copied together for others: a ring's peers take rows of keys and values, Ulysses' peers the columns of their
heads, by engines that copy rows at one distance.
"""

# Shapes: B batch, T tokens on this rank, L of all ranks, W columns, H query heads, K key/value heads, D head_dim.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ds_ring.transport.peer_memory import rows_of
from ds_ring.transport.shared import ViewOf


@dataclass(frozen=True)
class QKVLayout:
    """Views of a contiguous whole of ``shape``, [B, T, W]: k and v, and q where it is one too. Only their shapes and
    strides count."""

    shape: tuple[int, int, int]
    k_BTKD: Tensor
    v_BTKD: Tensor
    q_BTHD: Tensor | None

    @property
    def keys_values(self) -> ViewOf | None:
        """Where keys and values, as one tensor [2, B, T, K, D], lie; None where they are not alike, or not rows at one
        distance."""
        k_BTKD, v_BTKD = self.k_BTKD, self.v_BTKD
        apart, alike = v_BTKD.storage_offset() - k_BTKD.storage_offset(), k_BTKD.shape == v_BTKD.shape
        if not alike or k_BTKD.stride() != v_BTKD.stride() or apart <= 0 or rows_of(k_BTKD) is None:
            return None
        return ViewOf(self.shape, (int(apart), *k_BTKD.stride()), int(k_BTKD.storage_offset()))

    def shares(self, heads: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Shares | None:
        """What each rank wants, of whose query heads and key/value heads ``heads`` lists the numbers; None where that
        is not whole columns."""
        if self.q_BTHD is None:
            return None
        views = (self.q_BTHD, self.k_BTKD, self.v_BTKD)
        found = [share for q, kv in heads if (share := self._share(views, (q, kv, kv))) is not None]
        return Shares(self.shape, found) if len(found) == len(heads) else None

    def _share(self, views: tuple[Tensor, ...], heads: tuple[Sequence[int], ...]) -> Share | None:
        _, length, width = self.shape
        parts, stops, head_dim = [], [], views[0].shape[3]
        for view, own in zip(views, heads, strict=True):
            neighbours = list(own) == list(range(own[0], own[0] + len(own)))
            if not neighbours or view.shape[3] != head_dim:
                return None
            if view.stride()[:2] != (length * width, width) or view.stride(3) != 1:
                return None
            distance, first = int(view.stride(2)), int(view.storage_offset() + own[0] * view.stride(2))
            parts.append(HeadColumns(0, first, len(own), distance))
            stops.append(first + (len(own) - 1) * distance + head_dim)
        low, high = min(part.first for part in parts), max(stops)
        if high - low == head_dim * sum(part.heads for part in parts):  # they fill it, head by head
            moved = [HeadColumns(0, part.first - low, part.heads, part.distance) for part in parts]
            return Share((slice(low, high),), tuple(moved), head_dim)
        if any(stop - part.first != head_dim * part.heads for part, stop in zip(parts, stops, strict=True)):
            return None
        columns = tuple(slice(part.first, stop) for part, stop in zip(parts, stops, strict=True))
        return Share(columns, tuple(HeadColumns(n, 0, p.heads, p.distance) for n, p in enumerate(parts)), head_dim)


@dataclass(frozen=True)
class Shares:
    """What every rank wants of a whole of ``shape``, [B, T, W]."""

    shape: tuple[int, int, int]
    by_rank: list[Share]


@dataclass(frozen=True)
class HeadColumns:
    """Heads in one of several blocks of columns: the first column, how many, columns from one to the next."""

    block: int
    first: int
    heads: int
    distance: int


@dataclass(frozen=True)
class Share:
    """One rank's columns of a projection, in blocks of neighbours, and where q, k and v are in them."""

    columns: tuple[slice, ...]
    parts: tuple[HeadColumns, ...]
    head_dim: int

    def views(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """q [B, L, h, D], k and v of ``blocks`` [B, L, *], each contiguous."""
        found = []
        for part in self.parts:
            block, size = blocks[part.block], (*blocks[part.block].shape[:2], part.heads, self.head_dim)
            strides = (*block.stride()[:2], part.distance, 1)
            found.append(block.as_strided(size, strides, block.storage_offset() + part.first))
        return found
