"""Token after token: every step takes the same launches, which a GPU is told once, as a CUDA graph."""

# Shapes: b rows of this replica, V vocabulary.
from __future__ import annotations

import torch
from torch import Tensor

from ds_ring.engine.cuda_graph import DecodeStep
from ds_ring.engine.model_runner import CachedRunner
from ds_ring.kv_cache.shard import KVCacheShard
from ds_ring.kv_cache.step import TokenStep


class DecodeLoop:
    """One token more in each row, a call.

    Whatever changes from step to step is in tensors of its own, which the launches read: the tokens, their positions,
    and the slot they get. Until the cache moves the launches stay the same, so the second step after that is
    captured; the first compiles kernels and lets libraries choose theirs.

    Args:
        seen_b1: tokens of each row so far, int64: the next one's position for the model.
        places_b1: the next token's position in the cache, int32. Both are counted on in place.
    """

    def __init__(
        self, runner: CachedRunner, cache_shard: KVCacheShard, seen_b1: Tensor, cache_positions_b1: Tensor
    ) -> None:
        self._runner, self._cache_shard = runner, cache_shard
        self._seen_b1, self._cache_positions_b1 = seen_b1, cache_positions_b1
        self._ids_b1 = torch.zeros_like(seen_b1)
        self._slot_1 = torch.zeros(1, dtype=torch.long, device=runner.device)
        self._replay: DecodeStep | None = None
        self._settled = -1
        """``store.moves`` behind the last step that was not a replay."""

    @torch.inference_mode()
    def __call__(self, ids_b1: Tensor) -> Tensor:
        """Logits [b, V], the same on every rank of the replica, in memory of their own. Nothing waits for the device:
        what is needed on the host is known beforehand."""
        slot = self._cache_shard.take_token()
        self._ids_b1.copy_(ids_b1)
        self._slot_1.fill_(slot)
        if self._cache_shard.moves != self._settled:
            self._replay = None
            logits_bV = self._run()
            self._settled = self._cache_shard.moves
            return logits_bV
        if self._replay is None:
            self._replay = self._runner.capture(self._run)
        return self._run() if self._replay is None else self._replay().clone()

    @torch.inference_mode()
    def again(self) -> None:
        """The last step once more in the slot it had, never as a graph, so that hooks of layers hear of it."""
        self._seen_b1 -= 1
        self._cache_positions_b1 -= 1
        self._run()

    def _run(self) -> Tensor:
        runner = self._runner
        step = TokenStep(self._cache_shard, self._cache_positions_b1, self._slot_1, runner.decodes_sliced)
        logits_bV = runner.decode(self._ids_b1, self._seen_b1, step)
        self._seen_b1 += 1
        self._cache_positions_b1 += 1
        return logits_bV
