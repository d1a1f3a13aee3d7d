"""Who holds which tokens of a sequence: pure arithmetic, no tensors, no communication.

A sequence of ``length`` tokens is padded at its end to ``padded_length`` and cut over ``ring_degree x ulysses_degree``
ranks. *Ring rank* r holds one or two ranges of neighbouring tokens (its *slice*); the Ulysses ranks of r hold equal,
consecutive parts of that slice.

- ``contiguous``: R chunks, ring rank r holds chunk r. Causal attention then costs rank r in proportion to r + 1/2.
- ``zigzag``: 2R chunks, ring rank r holds chunks r and 2R-1-r, which makes causal work equal on all ranks.

Padding needs no mask under causal attention: padded tokens come last, so no real token ever sees them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ds_ring.errors import ConfigError

RingImpl = Literal["zigzag", "contiguous"]


@dataclass(frozen=True)
class TokenRange:
    """Tokens ``start .. stop-1`` of the global sequence."""

    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class Block:
    """One attention call of a ring rank: rows of its query slice against rows of a key slice.

    Row numbers count inside the two slices; offsets are the global positions of the first row. Under ``causal`` key j
    is visible from query i when ``k_offset + j <= q_offset + i``; otherwise every pair of the block is visible.
    """

    q_rows: slice
    k_rows: slice
    causal: bool
    q_offset: int
    k_offset: int


@dataclass(frozen=True)
class SequenceLayout:
    """The cut of one sequence length over ring and Ulysses ranks."""

    length: int
    ring_degree: int = 1
    ulysses_degree: int = 1
    ring_impl: RingImpl = "zigzag"

    def __post_init__(self) -> None:
        for name in ("length", "ring_degree", "ulysses_degree"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def chunks_per_rank(self) -> int:
        return 2 if self.ring_impl == "zigzag" and self.ring_degree > 1 else 1

    @property
    def multiple(self) -> int:
        """Padded lengths are multiples of this: every chunk whole, every slice divisible by ``ulysses_degree``."""
        return self.ring_degree * math.lcm(self.chunks_per_rank, self.ulysses_degree)

    @property
    def padded_length(self) -> int:
        return -(-self.length // self.multiple) * self.multiple

    @property
    def slice_length(self) -> int:
        """Tokens of one ring rank's slice."""
        return self.padded_length // self.ring_degree

    @property
    def local_length(self) -> int:
        """Tokens on one rank."""
        return self.slice_length // self.ulysses_degree

    @property
    def chunk_length(self) -> int:
        return self.slice_length // self.chunks_per_rank

    def slice_ranges(self, ring_rank: int) -> tuple[TokenRange, ...]:
        """The token ranges of a ring rank's slice, in ascending order, which is also their order in memory."""
        c = self.chunk_length
        if self.chunks_per_rank == 2:
            return TokenRange(ring_rank * c, c), TokenRange((2 * self.ring_degree - 1 - ring_rank) * c, c)
        return (TokenRange(ring_rank * c, c),)

    def slice_positions(self, ring_rank: int) -> list[int]:
        return [p for token_range in self.slice_ranges(ring_rank) for p in range(token_range.start, token_range.stop)]

    def positions(self, ring_rank: int, ulysses_rank: int = 0) -> list[int]:
        """Global positions of the tokens on one rank, in memory order; those >= ``length`` are padding."""
        n = self.local_length
        return self.slice_positions(ring_rank)[ulysses_rank * n : (ulysses_rank + 1) * n]

    def visible_rows(self, q_rank: int, k_rank: int) -> int:
        """How many leading rows of ``k_rank``'s slice some query of ``q_rank`` sees under causal attention.

        Runs ascend, so what is visible is always a prefix of the slice: the only part that has to move.
        """
        last_query = self.slice_ranges(q_rank)[-1].stop - 1
        return sum(
            max(0, min(token_range.stop, last_query + 1) - token_range.start)
            for token_range in self.slice_ranges(k_rank)
        )

    def blocks(self, q_rank: int, k_rank: int) -> list[Block]:
        """The fewest causal attention calls that cover ``q_rank``'s queries against ``k_rank``'s visible keys."""
        if q_rank == k_rank:
            # Both sides ascend through the same positions, so local order decides visibility exactly as global
            # order does, and one causal call covers all of them.
            rows = slice(0, self.slice_length)
            return [Block(rows, rows, True, 0, 0)]
        calls: list[Block] = []
        for i, q_range in enumerate(self.slice_ranges(q_rank)):
            seen = sum(
                token_range.length for token_range in self.slice_ranges(k_rank) if token_range.stop <= q_range.start
            )
            if not seen:
                continue
            q_rows = slice(i * self.chunk_length, (i + 1) * self.chunk_length)
            if calls and calls[-1].k_rows.stop == seen:
                calls[-1] = Block(slice(calls[-1].q_rows.start, q_rows.stop), slice(0, seen), False, 0, 0)
            else:
                calls.append(Block(q_rows, slice(0, seen), False, 0, 0))
        return calls

    def windowed_blocks(self, q_rank: int, k_rank: int, window: int) -> list[Block]:
        """As ``blocks`` for a sliding window: pairs of token ranges with true offsets, those out of reach left out."""
        calls = []
        for i, q_range in enumerate(self.slice_ranges(q_rank)):
            for j, k_range in enumerate(self.slice_ranges(k_rank)):
                if k_range.start > q_range.stop - 1 or k_range.stop - 1 <= q_range.start - window:
                    continue
                c = self.chunk_length
                rows = slice(i * c, (i + 1) * c), slice(j * c, (j + 1) * c)
                calls.append(Block(*rows, True, q_range.start, k_range.start))
        return calls
