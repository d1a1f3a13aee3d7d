"""Decoding, one token a step: all steps take the same kernel launches, which are captured once as a CUDA graph."""

# Shapes: b sequences of this replica, V vocabulary.
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_ring.engine.cuda_graph import DecodeStep
from ds_ring.engine.model_runner import CachedRunner
from ds_ring.hf.rope import Regime
from ds_ring.kv_cache.shard import KVCacheShard
from ds_ring.kv_cache.step import TokenStep


class DecodeLoop:
    """Each call adds one token to every sequence.

    What changes from step to step is in tensors that the kernels read: the tokens, their positions, and the slot they
    get. The launches stay the same until the memory of the cache moves, or rotary frequencies change with the length.
    The first step after that compiles kernels and lets libraries choose theirs; the second one is captured.

    Args:
        seen_b1: tokens of each sequence so far, int64: the next token's position for the model.
        cache_positions_b1: the next token's position in the cache, int32. Both are incremented in place.
        lengths: ``seen_b1`` on the host.
    """

    def __init__(
        self,
        runner: CachedRunner,
        cache_shard: KVCacheShard,
        seen_b1: Tensor,
        cache_positions_b1: Tensor,
        lengths: Sequence[int],
    ) -> None:
        self._runner, self._cache_shard = runner, cache_shard
        self._seen_b1, self._cache_positions_b1 = seen_b1, cache_positions_b1
        self._begun_with, self._steps = tuple(lengths), 0
        self._ids_b1 = torch.zeros_like(seen_b1)
        self._slot_1 = torch.zeros(1, dtype=torch.long, device=runner.device)
        self._replay: DecodeStep | None = None
        self._launched: tuple[int, list[Regime]] | None = None
        """What the launches of the last step that was not a replay depended on."""

    @torch.inference_mode()
    def __call__(self, ids_b1: Tensor) -> Tensor:
        """Logits [b, V] in memory of their own, the same on every rank of the replica. Nothing waits for the device."""
        slot = self._cache_shard.take_token()
        self._ids_b1.copy_(ids_b1)
        self._slot_1.fill_(slot)
        self._steps += 1
        if self._launches() != self._launched:
            self._replay = None
            logits_bV = self._step()
            self._launched = self._launches()
            return logits_bV
        if self._replay is None:
            self._replay = self._runner.capture(self._step)
        return self._step() if self._replay is None else self._replay().clone()

    def _lengths(self) -> list[int]:
        """Tokens of each sequence, those of this step included."""
        return [length + self._steps for length in self._begun_with]

    def _launches(self) -> tuple[int, list[Regime]]:
        """What the launches of a step depend on: where memory is, and which rotary frequencies are taken."""
        rope = self._runner.rope
        return self._cache_shard.moves, [rope.regime(n) for n in self._lengths()] if rope.matter else []

    @torch.inference_mode()
    def repeat_last_step(self) -> None:
        """The last step once more, in the same slot and never as a graph, so that hooks of layers run."""
        self._seen_b1 -= 1
        self._cache_positions_b1 -= 1
        self._step()

    def _step(self) -> Tensor:
        runner = self._runner
        step = TokenStep(self._cache_shard, self._cache_positions_b1, self._slot_1, runner.decodes_sliced)
        logits_bV = runner.decode(self._ids_b1, self._seen_b1, step, self._lengths)
        self._seen_b1 += 1
        self._cache_positions_b1 += 1
        return logits_bV
