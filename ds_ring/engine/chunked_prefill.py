"""Prompts on their way into a cache: the rows of a batch, cut into chunks that run one after the other."""

# Shapes: B rows, L tokens of the chunk, T of them on this rank.
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ds_ring.attention.backends.positions import EMPTY
from ds_ring.engine.batch import Batch
from ds_ring.kv_cache.occupancy import SlotRanges
from ds_ring.kv_cache.shard import KVCacheShard
from ds_ring.kv_cache.step import ChunkStep, Step


@dataclass(frozen=True)
class PrefillChunk(Batch):
    """A batch whose keys and values are kept.

    Attributes:
        places_BL: where each token stands in its row, int32; ``EMPTY`` at padding. Unlike ``position_ids_BL`` it counts
            padding between tokens.
        store_rows: which of the store's rows these are.
        starts, held: slots filled on every rank before and after.
        seen: runs of those before in which each of its rows has a token; between them none has.
        is_first: nothing is cached yet.
    """

    cache_positions_BL: Tensor
    cache_shard: KVCacheShard
    cache_rows: slice
    starts: tuple[int, ...]
    held: tuple[int, ...]
    seen: tuple[SlotRanges, ...]
    is_first: bool

    in_order: ClassVar[bool] = True

    def step(self, positions_T: Tensor, device: torch.device) -> Step | None:
        beyond = max(0, int(positions_T.max()) + 1 - self.length)
        cache_positions_BT = pad(self.cache_positions_BL, (0, beyond), value=EMPTY)[:, positions_T].to(device)
        return ChunkStep(
            self.cache_shard, self.cache_rows, cache_positions_BT, self.starts, self.held, self.seen, self.is_first
        )


def chunks(
    batch: Batch,
    cache_positions_BL: Tensor,
    cache_shard: KVCacheShard,
    *,
    size: int,
    rows_at_a_time: int,
    slots: Callable[[int], int],
    tokens_held: Callable[[int, int], Sequence[int]],
) -> Iterator[list[PrefillChunk]]:
    """Lists of micro-batches, a list for each chunk: ``size`` tokens a row, or what more divides among ranks; 0: all.

    ``batch`` and ``places_BL`` are this replica's rows, ``slots(length)`` the slots that a chunk takes on each rank, of
    which the first ``tokens_held(length, n)[rank]`` get a token in a row that has n of them.
    Where each goes is settled here, so that they may be run list by list or, in order, all in one pipeline.
    """
    # So many tokens take the slots of a whole number a rank: with those filled, chunks leave no gaps.
    size = slots(size) * len(cache_shard.used) if size else batch.length
    for start in range(0, batch.length, size):
        columns = slice(start, min(start + size, batch.length))
        starts, is_first, found = tuple(cache_shard.used), max(cache_shard.used) == 0, []
        for micro_batch in batch.micro_batches(rows_at_a_time):
            length = min(micro_batch.length, columns.stop) - start
            if length <= 0:
                continue
            rows = slice(micro_batch.rows.start - batch.rows.start, micro_batch.rows.stop - batch.rows.start)
            held = tuple(s + slots(length) for s in starts)
            lengths = tuple(min(max(n - start, 0), length) for n in micro_batch.lengths)
            seen = tuple(cache_shard.occupancy.of(rows, rank) for rank in range(len(starts)))
            by_rank = {n: tokens_held(length, n) for n in set(lengths)}
            for row, n in zip(range(rows.start, rows.stop), lengths, strict=True):
                for rank, count in enumerate(by_rank[n]):
                    cache_shard.occupancy.add(row, rank, starts[rank], count)
            found.append(
                PrefillChunk(
                    ids_BL=micro_batch.ids_BL[:, columns],
                    position_ids_BL=micro_batch.position_ids_BL[:, columns],
                    lengths=lengths,
                    rows=micro_batch.rows,
                    cache_positions_BL=cache_positions_BL[rows, start : start + length],
                    cache_shard=cache_shard,
                    cache_rows=rows,
                    starts=starts,
                    held=held,
                    seen=seen,
                    is_first=is_first,
                )
            )
        cache_shard.used = [s + max(slots(m.length) for m in found) for s in starts]
        yield found
