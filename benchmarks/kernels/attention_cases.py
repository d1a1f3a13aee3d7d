"""The blocks of attention that are timed, their FLOPs and their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ds_ring.parallel.layout import SequenceLayout, TokenRange

Kind = Literal["self", "zigzag half block", "carry", "zigzag rank", "decode", "back-ends"]
KINDS: tuple[str, ...] = get_args(Kind)

HEADS_OF = {64: 128, 128: 64, 256: 32, 512: 16}
"""Heads by head_dim: always the paper's width of 8192, so that the work of a token is equal."""

BATCH_OF = {2500: 8, 10_000: 2, 32_768: 1}
"""Batch by length: over a thousand tiles of 128 queries at every head_dim, also of half blocks."""

DECODE_BATCH = 8


@dataclass(frozen=True)
class Case:
    """A block of attention. ``ranks`` > 1: all queries of a rank of a zigzag layout, and all keys that they see."""

    head_dim: int
    causal: bool
    batch: int
    heads: int
    kv_heads: int
    seq_q: int
    seq_k: int
    kind: Kind = "self"
    ranks: int = 1

    @property
    def label(self) -> str:
        mask = "causal" if self.causal else "full"
        size = f"d{self.head_dim} {mask} B{self.batch} H{self.heads}/{self.kv_heads} {self.seq_q} x {self.seq_k}"
        return f"{self.kind} {size}" + (f" P{self.ranks}" if self.ranks > 1 else "")

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    @property
    def layout(self) -> SequenceLayout:
        return SequenceLayout(self.seq_q * self.ranks, ring_degree=self.ranks)

    @property
    def rank(self) -> int:
        """A middle rank. All ranks do equal work."""
        return self.ranks // 2

    @property
    def ranges(self) -> tuple[TokenRange, ...]:
        """The global positions of the queries. Those of the keys are 0 .. seq_k - 1."""
        if self.ranks > 1:
            return self.layout.slice_ranges(self.rank)
        return (TokenRange(self.seq_k - self.seq_q, self.seq_q),)

    @property
    def edges(self) -> list[int]:
        """Bounds of the segments of keys that a rank has: its own keys stay where they were made, apart from those
        before, between and after them."""
        changes: set[int] = set()
        for own in self.ranges if self.ranks > 1 else ():
            changes ^= {own.start, own.stop}  # no bound where one range begins at the end of another
        return sorted({0, self.seq_k, *changes})

    @property
    def flops(self) -> float:
        """4 for each head, dimension, and pair of a query and a key that it sees."""
        pairs = self.seq_q * self.seq_k
        if self.causal:
            pairs = sum(r.length * r.start + r.length * (r.length + 1) // 2 for r in self.ranges)
        return 4.0 * self.batch * self.heads * self.head_dim * pairs

    def kv_bytes(self, itemsize: int) -> int:
        return 2 * self.batch * self.seq_k * self.kv_heads * self.head_dim * itemsize


def zigzag_rank(head_dim: int, batch: int, heads: int, length: int, ranks: int) -> Case:
    layout = SequenceLayout(length, ring_degree=ranks)
    seen = layout.slice_ranges(ranks // 2)[-1].stop
    return Case(head_dim, True, batch, heads, heads, layout.slice_length, seen, "zigzag rank", ranks)


def default_cases() -> list[Case]:
    cases = []
    for head_dim, heads in HEADS_OF.items():
        for length, batch in BATCH_OF.items():
            cases += [Case(head_dim, causal, batch, heads, heads, length, length) for causal in (False, True)]
            # In a zigzag layout, a rank's later queries see all keys of a later rank, and all its queries see the first
            # half of the keys of an earlier rank. Neither block is causal.
            for shape in ((length // 2, length), (length, length // 2)):
                cases += [Case(head_dim, False, batch, heads, heads, *shape, "zigzag half block")]
            # One query sees all keys, with a causal mask or without.
            cases += [Case(head_dim, False, DECODE_BATCH, heads, heads, 1, length, "decode")]
    cases += [Case(512, True, 2, 16, 4, 10_000, 10_000), Case(128, True, 2, 32, 8, 10_000, 10_000)]
    for head_dim in (512, 128):
        heads = HEADS_OF[head_dim]
        cases += [zigzag_rank(head_dim, 8, heads, 10_000, ranks) for ranks in (2, 16)]
    cases += [Case(512, False, 8, 16, 16, 1250, 2500, "carry")]
    for head_dim, heads, kv_heads in ((512, 16, 4), (128, 32, 8)):
        cases += [Case(head_dim, False, 8, heads, kv_heads, 1, length, "decode") for length in (32_768, 100_000)]
    # Where cuDNN starts to be faster than FlashAttention-2: few queries, and causal blocks after keys that all see.
    cases += [Case(128, False, 8, 64, 64, rows, rows, "back-ends") for rows in (64, 128, 256, 512)]
    cases += [Case(128, True, 8, 64, 64, 1024, 1024 + ahead, "back-ends") for ahead in (256, 512, 1024, 2048, 4096)]
    return sorted(cases, key=lambda case: KINDS.index(case.kind))


def select(cases: Sequence[Case], only: Sequence[str] = (), kinds: Sequence[str] = ()) -> list[Case]:
    """Cases with every word of ``only`` in their label and one of ``kinds`` in their kind. Empty: no filter."""
    return [
        case
        for case in cases
        if all(word in case.label for word in only) and (not kinds or any(word in case.kind for word in kinds))
    ]


@dataclass(frozen=True)
class Inputs:
    """Random tensors of a case: q [B, L, H, D], k and v [B, S, K, D], in the order of the sequence.

    ``state``: the result of a ring's earlier blocks, (out [B, L, H, D], lse [B, H, L]), both fp32.
    """

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    state: tuple[Tensor, Tensor] | None = None


def make_inputs(case: Case, device: torch.device) -> Inputs:
    # Every call reads the same tensors. In every default case q, k and v together are larger than the L2 cache (50 MB),
    # mostly many times, so a call finds little there of the call before it.
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    shape_q = case.batch, case.seq_q, case.heads, case.head_dim
    shape_k = case.batch, case.seq_k, case.kv_heads, case.head_dim
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for shape in (shape_q, shape_k, shape_k))
    if case.kind != "carry":
        return Inputs(case, q, k, v)
    out = torch.randn(shape_q, device=device)
    # About the lse of as many other random keys, so that both sides of the merge have weight.
    lse = torch.randn(case.batch, case.heads, case.seq_q, device=device) + torch.tensor(float(case.seq_k)).log().item()
    return Inputs(case, q, k, v, state=(out, lse))
