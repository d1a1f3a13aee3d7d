"""How a parameter is cut among the ranks that hold it between them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

LEAST = 2
"""Parameters of fewer dimensions, such as those of norms and biases, are whole on every rank."""


@dataclass(frozen=True)
class Cut:
    """Rank r holds ``bounds[r]`` to ``bounds[r + 1]`` along ``dim``."""

    dim: int
    bounds: tuple[int, ...]

    def part(self, whole: Tensor, rank: int) -> Tensor:
        """A view."""
        return whole.narrow(self.dim, self.bounds[rank], self.length(rank))

    def length(self, rank: int) -> int:
        return self.bounds[rank + 1] - self.bounds[rank]

    def shape(self, whole: tuple[int, ...], rank: int) -> tuple[int, ...]:
        """Of the part, where the parameter has the shape ``whole``."""
        return (*whole[: self.dim], self.length(rank), *whole[self.dim + 1 :])


def cut_of(parameter: Tensor, style: str | None, size: int) -> Cut | None:
    """As tensor parallelism cuts it, so that steps of decoding use the parts as they are; by rows where the plan says
    nothing. None: whole on every rank.

    Args:
        style: how transformers' tensor-parallel plan has it, None: not at all.
    """
    if parameter.dim() < LEAST:
        return None
    dim = 1 if style == "rowwise" and size > 1 else 0
    return Cut(dim, bounds(parameter.shape[dim], size))


def bounds(count: int, size: int) -> tuple[int, ...]:
    """Equal parts where they divide; else those of the last ranks are smaller."""
    share = -(-count // size)
    return tuple(min(rank * share, count) for rank in range(size + 1))
