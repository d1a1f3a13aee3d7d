"""transformers' own ``generate`` over a runner, with one random state for all ranks."""

# Shapes: B sequences of the caller's batch, C columns.
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

from ds_ring.engine.generate_args import check_generate_args
from ds_ring.engine.generation_forward import GenerationForward, Progress
from ds_ring.engine.model_runner import CachedRunner
from ds_ring.engine.oom import generation_note, with_memory_note
from ds_ring.hf.generation_adapter import GenerationAdapter
from ds_ring.hf.generation_callbacks import CHANGING_SCORES, chosen_alike
from ds_ring.transport.base import Transport


def generate(
    runner: CachedRunner,
    input_ids: Tensor | None,
    inputs: Tensor | None,
    attention_mask: Tensor | None,
    generation_config: GenerationConfig | None,
    past_key_values: Cache | None,
    streamer: BaseStreamer | None,
    progress: Progress | None,
    options: dict[str, Any],
) -> Tensor | GenerateDecoderOnlyOutput:
    """See ``Engine.generate``."""
    world = runner.mesh["world"]
    forward = GenerationForward(runner, progress if world.rank == 0 else None)
    adapter = GenerationAdapter(runner.model, runner.device, forward, world, forward.fine)
    request = check_generate_args(
        runner, adapter, input_ids, inputs, attention_mask, generation_config, past_key_values, streamer, progress,
        options,
    )  # fmt: skip
    forward.new_tokens, forward.prefill_chunk = request.new_tokens, request.prefill_chunk
    adapter.agrees_on_choice = not chosen_alike(request.settings, options)
    adapter.agrees_on_scores = bool(request.settings.output_scores) and any(options.get(n) for n in CHANGING_SCORES)
    past, mask_BC = request.cache.get_seq_length(), request.mask_BC

    def note() -> str:
        prompt, length = int(mask_BC[:, past:].sum(1).max()), int(mask_BC.sum(1).max()) + request.new_tokens
        return generation_note(runner, len(request.cache.sequences), prompt, length, request.prefill_chunk)

    with (
        with_memory_note(note),
        _one_generator(world, runner.device, request.settings.do_sample),
    ):
        result: Tensor | GenerateDecoderOnlyOutput = adapter.generate(
            request.input_ids.to(runner.device),
            attention_mask=mask_BC.long().to(runner.device),
            generation_config=generation_config,
            past_key_values=request.cache,
            streamer=_CheckedStreamer(streamer, forward.fine) if world.rank == 0 and streamer is not None else None,
            **options,
        )
    if not bool(forward.fine):
        raise forward.located()
    request.cache.whole = True
    return result


class _CheckedStreamer(BaseStreamer):
    """Passes on the tokens that were chosen by finite logits."""

    def __init__(self, streamer: BaseStreamer, fine: Tensor) -> None:
        self._streamer, self._fine = streamer, fine

    def put(self, value: Tensor) -> None:
        # ``value`` was copied from the device after the logits were made: this test waits for nothing.
        if bool(self._fine):
            self._streamer.put(value)

    def end(self) -> None:
        self._streamer.end()


@contextmanager
def _one_generator(world: Transport, device: torch.device, sampled: bool) -> Iterator[None]:
    """Inside the block every rank draws from rank 0's random state.

    After it, ranks that had the same state before go on as rank 0 does; others get their own state back.
    """
    if not sampled or world.size == 1:
        yield
        return
    cuda = device.type == "cuda"
    own = torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state()
    first = world.all_gather_objects(own)[0]

    def become(state: Tensor) -> None:
        torch.cuda.set_rng_state(state, device) if cuda else torch.set_rng_state(state)

    become(first)
    try:
        yield
    finally:
        if not torch.equal(own, first):
            become(own)
