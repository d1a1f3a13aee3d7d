"""Ranks and their coordinates on the mesh (dp, pp, tp, ring, ulysses): pure arithmetic.

The last axis varies fastest, so neighbouring ranks, which a launcher puts on one host, share the axis that talks most:
tensor parallel and Ulysses groups stay inside a host, ring, pipeline and data parallel groups may span hosts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Axis = Literal["dp", "pp", "ring", "ulysses", "tp", "sp", "weights", "world"]

AXES: tuple[Axis, ...] = ("dp", "pp", "ring", "ulysses", "tp")
COMBINED: dict[str, tuple[str, ...]] = {"sp": ("ring", "ulysses"), "world": AXES}


@dataclass(frozen=True)
class Topology:
    """Degrees of every axis; a *replica* is one data-parallel copy of the model.

    Attributes:
        weights: neighbours among the ranks that share a sequence hold one copy of the weights between them. No axis of
            its own: it divides ``sp``.
    """

    dp: int = 1
    pp: int = 1
    ring: int = 1
    ulysses: int = 1
    tp: int = 1
    weights: int = 1

    @property
    def world_size(self) -> int:
        return math.prod(getattr(self, axis) for axis in AXES)

    @property
    def sp(self) -> int:
        return self.ring * self.ulysses

    def size(self, axis: Axis) -> int:
        return math.prod(getattr(self, a) for a in COMBINED.get(axis, (axis,)))

    def coordinates(self, rank: int) -> dict[str, int]:
        """``{"dp": .., "pp": .., "ring": .., "ulysses": .., "tp": ..}`` of a global rank."""
        out = {}
        for axis in reversed(AXES):
            rank, out[axis] = divmod(rank, getattr(self, axis))
        return {axis: out[axis] for axis in AXES}

    def rank(self, **coordinates: int) -> int:
        """The global rank at the given coordinates (left-out axes are 0)."""
        rank = 0
        for axis in AXES:
            rank = rank * getattr(self, axis) + coordinates.get(axis, 0)
        return rank

    def index(self, axis: Axis, rank: int) -> int:
        """Where ``rank`` stands inside its group along ``axis``."""
        return self.group(axis, rank).index(rank)

    def group(self, axis: Axis, rank: int) -> tuple[int, ...]:
        """Global ranks of the group along ``axis`` that ``rank`` belongs to, in group order."""
        return next(g for g in self.groups(axis) if rank in g)

    def groups(self, axis: Axis) -> list[tuple[int, ...]]:
        """All groups along ``axis``. Every rank must create all of them, in this order."""
        if axis == "weights":
            return [
                sp[first : first + self.weights]
                for sp in self.groups("sp")
                for first in range(0, self.sp, self.weights)
            ]
        varying = COMBINED.get(axis, (axis,))
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            fixed = tuple(v for a, v in self.coordinates(rank).items() if a not in varying)
            found.setdefault(fixed, []).append(rank)
        return [tuple(g) for g in found.values()]

    def label(self) -> str:
        """The name of this layout in tables and file names: ``tp2_pp2``, ``ulysses2_ring2``, ``dp4`` …"""
        order = ("dp", "tp", "pp", "ulysses", "ring")
        parts = [f"{a}{getattr(self, a)}" for a in order if getattr(self, a) > 1]
        return "_".join(parts) or "single"
