"""The forward of every step of a generation: prompts in chunks, then tokens one by one."""

# Shapes: B sequences of the caller's batch, b of this replica, C new columns, L packed tokens of the longest sequence,
# V vocabulary.
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ds_ring.attention.backends.positions import EMPTY
from ds_ring.engine import nan_check
from ds_ring.engine.batch import pack
from ds_ring.engine.chunked_prefill import PrefillChunk, chunks
from ds_ring.engine.decode_loop import DecodeLoop
from ds_ring.engine.gather import gather_replicas
from ds_ring.engine.model_runner import CachedRunner
from ds_ring.errors import NumericsError
from ds_ring.hf.cache import ShardedCache
from ds_ring.hf.cache_refill import refills

Progress = Callable[[int, int], None]
"""(tokens that are done, all tokens) -> None"""


class GenerationForward:
    """The adapter's forward: of new columns of all sequences, logits of the last column, alike on every rank."""

    def __init__(self, runner: CachedRunner, progress: Progress | None) -> None:
        self._runner, self._progress = runner, progress
        self.fine = torch.ones((), dtype=torch.bool, device=runner.device)
        """Whether all logits so far are finite; the same on all ranks. It stays on the device, as a stopping criterion:
        transformers waits for stopping criteria once a step anyway, so that no step waits twice."""
        self.prefill_chunk = 0
        """Prompt tokens of each sequence that run at a time; 0: all."""
        self.new_tokens = 0
        """How many tokens may be generated: the cache makes room for them."""
        self._prefilled: ShardedCache | None = None
        self._decoding: DecodeLoop | None = None

    @torch.inference_mode()
    def __call__(self, ids_BC: Tensor, mask_BC: Tensor | None, cache: ShardedCache) -> Tensor:
        cache.whole = False
        is_step = ids_BC.shape[1] == 1 and cache is self._prefilled
        new_BC = torch.ones(ids_BC.shape, dtype=torch.bool) if is_step else _new_columns(ids_BC, mask_BC)
        if self._refills(cache, new_BC):
            ids_BC, new_BC = torch.cat((cache.ids_BC, ids_BC.cpu()), 1), torch.cat((cache.mask_BC, new_BC), 1)
            cache.clear()
            is_step = False
        if is_step:
            assert self._decoding is not None
            cache.extend(ids_BC, new_BC)
            logits_bV = self._decoding(ids_BC[cache.sequences.start : cache.sequences.stop])
        else:
            logits_bV = self._prefill(ids_BC.cpu(), new_BC, cache)
        logits_BV = gather_replicas(logits_bV, ids_BC.shape[0], self._runner.mesh["dp"])
        self.fine &= torch.isfinite(logits_BV).all()
        # Sampling from NaN fails; on a GPU that error ends the process.
        return logits_BV.where(self.fine, 0)

    def _refills(self, cache: ShardedCache, new_BC: Tensor) -> bool:
        """Whether some sequence goes over to other rotary frequencies, and the model would not keep its cache."""
        rope = self._runner.rope
        return rope.matter and any(
            rope.regime(held) != rope.regime(held + new) and refills(self._runner.model, held, held + new)
            for held, new in zip(cache.tokens, new_BC.sum(1).tolist(), strict=False)  # nothing is held at first
        )

    def located(self) -> NumericsError:
        """Where NaN or infinity began in the last step: every rank repeats it."""
        assert self._decoding is not None
        return nan_check.located(self._runner, self._decoding.repeat_last_step)

    def _prefill(self, ids_BC: Tensor, new_BC: Tensor, cache: ShardedCache) -> Tensor:
        runner, past = self._runner, cache.get_seq_length()
        held_B1 = torch.tensor(cache.tokens or [0] * len(new_BC))[:, None]
        seen_BC = held_B1 + new_BC.cumsum(1)
        whole, columns_BL = pack(ids_BC, new_BC, (seen_BC - 1) * new_BC, runner.dims)
        cache.extend(ids_BC, new_BC)
        cache_positions_BL = torch.where(columns_BL < 0, EMPTY, columns_BL + past - cache.first_B[:, None]).int()
        batch, own = whole.split(cache.sequences), slice(cache.sequences.start, cache.sequences.stop)
        work = [
            part
            for parts in chunks(
                batch, cache_positions_BL[own], cache.cache_shard, size=self.prefill_chunk,
                sequences_at_a_time=runner.run_config.workload.micro_batch_size, slots=runner.slots,
                tokens_held=runner.tokens_held,
            )
            for part in parts
        ]  # fmt: skip
        cache.cache_shard.expect(self.new_tokens)
        seen_b1 = seen_BC[own, -1:]
        cache_positions_b1 = cache.get_seq_length() - cache.first_B[own, None].int()
        self._decoding = DecodeLoop(
            runner, cache.cache_shard, seen_b1.to(runner.device), cache_positions_b1.to(runner.device),
            lengths=seen_b1[:, 0].tolist(),
        )  # fmt: skip
        self._prefilled = cache
        return self._last_logits(work, batch.lengths)

    def _last_logits(self, work: list[PrefillChunk], lengths: tuple[int, ...]) -> Tensor:
        """Run all chunks; logits [b, V] of the last token of each sequence."""
        done = [0] * len(lengths)
        last: list[list[tuple[int, int]]] = []
        for part in work:
            found = []
            own = range(part.cache_sequences.start, part.cache_sequences.stop)
            for sequence, n in zip(own, part.lengths, strict=True):
                done[sequence] += n
                if n and done[sequence] == lengths[sequence]:
                    found.append((sequence, n - 1))
            last.append(found)
        keep = [torch.tensor(sorted({at for _, at in found}), dtype=torch.long) for found in last]
        logits: dict[int, Tensor] = {}
        with _reporting(self._progress, self._runner, [sum(part.lengths) for part in work]):
            shards = nan_check.checked_run(self._runner, list(work), keep, want_hidden=False)
        for shard, part, kept_k, found in zip(shards, work, keep, last, strict=True):
            if not found:
                continue
            whole_BkV = self._runner.assemble(shard.logits_BkV, part, kept_k, (self._runner.dims.vocab_size,))
            for sequence, at in found:
                logits[sequence] = whole_BkV[sequence - part.cache_sequences.start, int((kept_k == at).nonzero()[0])]
        logits_bV = torch.stack([logits[sequence] for sequence in range(len(lengths))])
        # Pipeline stages pass results on by themselves; tensor-parallel ranks each computed their own.
        return self._runner.mesh["tp"].broadcast(logits_bV, 0)


def _new_columns(ids_BC: Tensor, mask_BC: Tensor | None) -> Tensor:
    """Which of the new columns hold a token, bool, on the CPU; ``mask_BC`` is of all columns, the cached ones first."""
    if mask_BC is None:
        return torch.ones(ids_BC.shape, dtype=torch.bool)
    return mask_BC[:, -ids_BC.shape[1] :].cpu().bool()


@contextmanager
def _reporting(progress: Progress | None, runner: CachedRunner, tokens: list[int]) -> Iterator[None]:
    """Inside the block ``progress`` is called after every micro-batch that has passed this rank's last layer.

    Nothing waits for the GPU: that it has finished a micro-batch is seen when the next one has been queued.

    Args:
        tokens: of each micro-batch.
    """
    if progress is None:
        yield
        return
    totals, under_way = accumulate(tokens), deque[tuple[int, torch.cuda.Event | None]]()

    def queued(module: nn.Module, args: Any, out: Any) -> None:
        event = torch.cuda.Event() if runner.device.type == "cuda" else None
        if event is not None:
            event.record()
        under_way.append((next(totals, sum(tokens)), event))  # after NaN the pass is repeated
        while under_way and ((done := under_way[0][1]) is None or done.query()):
            progress(under_way.popleft()[0], sum(tokens))

    handle = runner.decoder.layers[-1].register_forward_hook(queued)
    try:
        yield
    finally:
        handle.remove()
