"""Chunked prefill: prompts are cut into chunks, which run one after the other and fill the cache."""

# Shapes: B sequences, L tokens of the chunk, T of them on this rank.
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
    """A micro-batch whose keys and values are kept.

    Attributes:
        cache_positions_BL: the position of each token in its sequence, int32; ``EMPTY`` at padding. Unlike
            ``position_ids_BL`` it counts padding between tokens.
        cache_sequences: which sequences of the cache these are.
        starts, held: slots filled on every rank before and after.
        seen: of the slots before, the ranges in which every sequence has a token; between them none has.
        is_first: nothing is cached yet.
        prompts: the whole of what these sequences are given, of which this is a chunk.
    """

    cache_positions_BL: Tensor
    cache_shard: KVCacheShard
    cache_sequences: slice
    starts: tuple[int, ...]
    held: tuple[int, ...]
    seen: tuple[SlotRanges, ...]
    is_first: bool
    prompts: Batch

    in_order: ClassVar[bool] = True

    def rope_lengths(self) -> tuple[int, ...]:
        return self.prompts.rope_lengths()

    def step(self, positions_T: Tensor, device: torch.device) -> Step | None:
        beyond = max(0, int(positions_T.max()) + 1 - self.length)
        cache_positions_BT = pad(self.cache_positions_BL, (0, beyond), value=EMPTY)[:, positions_T].to(device)
        return ChunkStep(
            self.cache_shard, self.cache_sequences, cache_positions_BT, self.starts, self.held, self.seen, self.is_first
        )


def chunks(
    batch: Batch,
    cache_positions_BL: Tensor,
    cache_shard: KVCacheShard,
    *,
    size: int,
    sequences_at_a_time: int,
    slots: Callable[[int], int],
    tokens_held: Callable[[int, int], Sequence[int]],
) -> Iterator[list[PrefillChunk]]:
    """Lists of micro-batches, one list for each chunk.

    The slots of every chunk are reserved here, so that chunks may run list by list or, in order, all in one pipeline.

    Args:
        batch, cache_positions_BL: this replica's sequences.
        size: tokens of a chunk in each sequence, rounded up to what divides among ranks; 0: the whole prompt.
        slots: of a chunk's length, the slots that it takes on each rank.
        tokens_held: of a chunk's length and the tokens n that a sequence has in it, how many of them each rank gets.
    """
    # Rounded up, a chunk fills the same number of slots on every rank, and the next one leaves no gap.
    size = slots(size) * len(cache_shard.used) if size else batch.length
    for start in range(0, batch.length, size):
        columns = slice(start, min(start + size, batch.length))
        starts, is_first, found = tuple(cache_shard.used), max(cache_shard.used) == 0, []
        for micro_batch in batch.micro_batches(sequences_at_a_time):
            length = min(micro_batch.length, columns.stop) - start
            if length <= 0:
                continue
            first = batch.sequences.start
            sequences = slice(micro_batch.sequences.start - first, micro_batch.sequences.stop - first)
            held = tuple(s + slots(length) for s in starts)
            lengths = tuple(min(max(n - start, 0), length) for n in micro_batch.lengths)
            seen = tuple(cache_shard.occupancy.of(sequences, rank) for rank in range(len(starts)))
            by_rank = {n: tokens_held(length, n) for n in set(lengths)}
            for sequence, n in zip(range(sequences.start, sequences.stop), lengths, strict=True):
                for rank, count in enumerate(by_rank[n]):
                    cache_shard.occupancy.add(sequence, rank, starts[rank], count)
            found.append(
                PrefillChunk(
                    ids_BL=micro_batch.ids_BL[:, columns],
                    position_ids_BL=micro_batch.position_ids_BL[:, columns],
                    lengths=lengths,
                    sequences=micro_batch.sequences,
                    cache_positions_BL=cache_positions_BL[sequences, start : start + length],
                    cache_shard=cache_shard,
                    cache_sequences=sequences,
                    starts=starts,
                    held=held,
                    seen=seen,
                    is_first=is_first,
                    prompts=micro_batch,
                )
            )
        cache_shard.used = [s + max(slots(m.length) for m in found) for s in starts]
        yield found
