"""The cache of a generation as a transformers ``Cache``: each rank holds a shard."""

# Shapes: B sequences of the caller's batch, C columns seen so far.
from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache

from ds_ring.errors import DsRingError, InputError
from ds_ring.kv_cache.shard import KVCacheShard


class ShardedCache(Cache):
    """Passed back to ``Engine.generate`` it continues a conversation, as in transformers.

    For attention, the position of a token is its column minus the first column of its sequence. Padding inside a
    sequence, such as after an early end, then counts in sliding windows as it does in transformers.

    Attributes:
        owner: the runner it belongs to.
        cache_shard: this rank's shard, of this replica's ``sequences``.
        first_B: the column of the first token of every sequence, its position 0, even where a mask hides it later.
        whole: the generation that last wrote to it has returned. Otherwise some layers may lack what others hold, and
            the caller does not know the tokens.
    """

    def __init__(self, owner: object, cache_shard: KVCacheShard, sequences: range) -> None:
        super().__init__(layers=[])
        self.owner, self.cache_shard, self.sequences = owner, cache_shard, sequences
        self.first_B = torch.empty(0, dtype=torch.long)
        self._masks: list[Tensor] = []
        self._ids: list[Tensor] = []
        self._columns = 0
        self.whole = True

    def __repr__(self) -> str:
        return f"ShardedCache({self._columns} columns; {self.cache_shard.used} slots on the ranks of a replica)"

    def memory_bytes(self) -> int:
        """Bytes of this rank's shard, empty slots included."""
        return self.cache_shard.nbytes

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding included: what transformers counts."""
        return self._columns

    @property
    def mask_BC(self) -> Tensor:
        """Which columns hold a token, of all sequences of the batch; bool, on the CPU."""
        return torch.cat(self._masks, dim=1)

    @property
    def ids_BC(self) -> Tensor:
        """The token ids in all columns, of all sequences of the batch; on the CPU. What the caller gave in columns that
        are padding counts for nothing."""
        self._ids = [torch.cat([ids_BC.cpu() for ids_BC in self._ids], dim=1)]
        return self._ids[0]

    def extend(self, ids_BC: Tensor, mask_BC: Tensor) -> None:
        """Count new columns; ``mask_BC`` is bool, on the CPU, with a token in every sequence. The ids are copied, on
        their device: nothing waits for it."""
        if not self._masks:
            self.first_B = mask_BC.int().argmax(1)
        self._masks.append(mask_BC)
        self._ids.append(ids_BC.clone())
        self._columns += mask_BC.shape[1]

    def clear(self) -> None:
        """Forget everything: no column has been seen."""
        self.cache_shard = self.cache_shard.emptied()
        self._masks, self._ids, self._columns = [], [], 0

    @torch.inference_mode()
    def revise(self, mask_BC: Tensor) -> None:
        """Forget tokens that the caller's mask now hides, such as those after an early end.

        Raises:
            InputError: the mask shows columns that were padding when they were run.
        """
        known_BC = self.mask_BC
        if (mask_BC & ~known_BC).any():
            sequence = int((mask_BC & ~known_BC).any(1).nonzero()[0])
            raise InputError(
                f"attention_mask shows columns of row {sequence} that were padding when the cache was made"
            )
        if torch.equal(mask_BC, known_BC):
            return
        own = slice(self.sequences.start, self.sequences.stop)
        self.cache_shard.hide((known_BC & ~mask_BC)[own], self.first_B[own])
        self._masks = [mask_BC]

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self._columns > 0

    @property
    def is_croppable(self) -> bool:
        return False

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise DsRingError(
            "a ShardedCache is read and written by the engine that made it, inside generate; other models and changes "
            "from outside (update, crop, reorder, repeat, select, reset) are not supported"
        )

    update = crop = reorder_cache = batch_repeat_interleave = batch_select_indices = reset = _refuse
