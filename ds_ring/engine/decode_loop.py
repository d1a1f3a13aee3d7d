"""Decoding, one token a step: all steps take the same kernel launches, which are captured once as a CUDA graph."""

# Shapes: b sequences of this replica, V vocabulary.
from __future__ import annotations

import torch
from torch import Tensor

from ds_ring.engine.cuda_graph import DecodeStep
from ds_ring.engine.model_runner import CachedRunner
from ds_ring.kv_cache.shard import KVCacheShard
from ds_ring.kv_cache.step import TokenStep


class DecodeLoop:
    """Each call adds one token to every sequence.

    What changes from step to step is in tensors that the kernels read: the tokens, their positions, and the slot they
    get. The launches stay the same until the memory of the cache moves. The first step after that compiles kernels and
    lets libraries choose theirs; the second one is captured.

    Args:
        seen_b1: tokens of each sequence so far, int64: the next token's position for the model.
        cache_positions_b1: the next token's position in the cache, int32. Both are incremented in place.
    """

    def __init__(
        self, runner: CachedRunner, cache_shard: KVCacheShard, seen_b1: Tensor, cache_positions_b1: Tensor
    ) -> None:
        self._runner, self._cache_shard = runner, cache_shard
        self._seen_b1, self._cache_positions_b1 = seen_b1, cache_positions_b1
        self._ids_b1 = torch.zeros_like(seen_b1)
        self._slot_1 = torch.zeros(1, dtype=torch.long, device=runner.device)
        self._replay: DecodeStep | None = None
        self._moves_at_last_step = -1
        """``cache_shard.moves`` after the last step that was not a replay."""

    @torch.inference_mode()
    def __call__(self, ids_b1: Tensor) -> Tensor:
        """Logits [b, V] in memory of their own, the same on every rank of the replica. Nothing waits for the device."""
        slot = self._cache_shard.take_token()
        self._ids_b1.copy_(ids_b1)
        self._slot_1.fill_(slot)
        if self._cache_shard.moves != self._moves_at_last_step:
            self._replay = None
            logits_bV = self._step()
            self._moves_at_last_step = self._cache_shard.moves
            return logits_bV
        if self._replay is None:
            self._replay = self._runner.capture(self._step)
        return self._step() if self._replay is None else self._replay().clone()

    @torch.inference_mode()
    def repeat_last_step(self) -> None:
        """The last step once more, in the same slot and never as a graph, so that hooks of layers run."""
        self._seen_b1 -= 1
        self._cache_positions_b1 -= 1
        self._step()

    def _step(self) -> Tensor:
        runner = self._runner
        step = TokenStep(self._cache_shard, self._cache_positions_b1, self._slot_1, runner.decodes_sliced)
        logits_bV = runner.decode(self._ids_b1, self._seen_b1, step)
        self._seen_b1 += 1
        self._cache_positions_b1 += 1
        return logits_bV
