"""Generation for a batch of prompts, with its times and the text of each completion."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, StopStringCriteria
from transformers.utils import GENERATION_CONFIG_NAME

from ds_ring.cli.generation_clock import GenerationClock, StderrText
from ds_ring.cli.prompts import left_padded
from ds_ring.cli.sampling import Sampling, overridden
from ds_ring.config import RunConfig
from ds_ring.engine.cache_fit import check_cache_fits
from ds_ring.engine.connect import local_device
from ds_ring.engine.engine import Engine
from ds_ring.engine.generate_args import check_before_loading
from ds_ring.engine.model_runner import CachedRunner
from ds_ring.errors import InputError
from ds_ring.hf.cache import ShardedCache
from ds_ring.hf.dims import model_dims
from ds_ring.hf.generation_fields import problem
from ds_ring.hf.generation_settings import read_generation_config
from ds_ring.utils.device import device_name
from ds_ring.utils.model_config import read_config


def generate(
    engine: Engine,
    tokenizer: Any,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    say: Callable[[str], None],
    stream: bool,
) -> dict[str, Any]:
    """Generate for all prompts at once. Collective.

    Args:
        prompts: token ids of each prompt.
        say: called on every rank with lines of progress.
        stream: print the text to standard error as it is generated, where there is one prompt.

    Returns:
        ``{"ttft_ms", "decode_tpot_ms", "tokens_per_second", …, "completions": [{prompt_tokens, token_ids, text}]}``,
        completions in the order of ``prompts``. ``ttft_ms`` is the time to the first token, ``decode_tpot_ms`` (whole
        time - ttft) / (steps - 1), None for a single step, and ``tokens_per_second`` new tokens of all prompts ÷ whole
        time.
    """
    topology = engine.mesh.topology
    assert isinstance(engine.runner, CachedRunner)
    options = _options(engine.model.generation_config, engine.config, tokenizer, max_new_tokens, sampling)
    ends, pad_id = set(options["eos_token_id"] or ()), options["pad_token_id"]
    # A replica without a prompt of its own repeats the first; its results are dropped.
    ids, mask = left_padded(prompts + prompts[:1] * (topology.dp - len(prompts)), pad_id)
    text = StderrText(tokenizer) if stream and len(ids) == 1 else None
    prompt_tokens = sum(map(len, prompts))
    clock = GenerationClock(text, prompt_tokens, say)
    say(f"{topology.label()}: prefill of {prompt_tokens:,} tokens in {len(prompts)} rows")
    torch.manual_seed(sampling.seed)
    engine.settle()
    engine.meet()
    clock.start()
    found: Any = engine.generate(
        ids, mask, streamer=clock, progress=clock.prefilled, return_dict_in_generate=True, **options
    )
    engine.settle()
    total_s = time.perf_counter() - clock.started
    new = found.sequences[: len(prompts), ids.shape[1] :].tolist()
    stopped = _stopped(tokenizer, engine.model.generation_config.stop_strings, found.sequences, ids.shape[1])
    completions = [
        _completion(tokenizer, prompt, tokens[:end], ends)
        for prompt, tokens, end in zip(prompts, new, stopped, strict=False)
    ]
    new_tokens, steps = sum(len(c["token_ids"]) for c in completions), len(new[0])
    assert isinstance(found.past_key_values, ShardedCache)
    cache_bytes = found.past_key_values.memory_bytes()
    del found
    most_cache_bytes = max(engine.gather(cache_bytes))
    decode_s = (total_s - clock.ttft_s) / (steps - 1) if steps > 1 else None
    return {
        "layout": engine.run_config.label,
        "decode": "sliced" if engine.runner.decodes_sliced else "whole",
        "gpus": topology.world_size,
        "device": device_name(engine.device),
        "dtype": engine.run_config.dtype,
        "ttft_ms": 1e3 * clock.ttft_s,
        "decode_tpot_ms": None if decode_s is None else 1e3 * decode_s,
        "tokens_per_second": new_tokens / total_s,
        "prefill_tokens_per_second": prompt_tokens / clock.ttft_s,
        "cache_gib_per_rank": most_cache_bytes / 2**30,
        "completions": completions,
    }


def summary(found: dict[str, Any]) -> str:
    """What ``generate`` returned, in one line."""
    step_ms = found["decode_tpot_ms"]
    steps = "" if step_ms is None else f"{step_ms:.2f} ms a token, "
    return (
        f"first token after {found['ttft_ms']:,.0f} ms, {steps}{found['tokens_per_second']:,.1f} tok/s, "
        f"cache {found['cache_gib_per_rank']:.3f} GiB a rank"
    )


def _completion(tokenizer: Any, prompt: list[int], new: list[int], ends: set[int]) -> dict[str, Any]:
    """The new tokens of one prompt, up to and with the first of ``ends``."""
    length = next((i + 1 for i, token in enumerate(new) if token in ends), len(new))
    text = tokenizer.decode(new[:length], skip_special_tokens=True)
    return {"prompt_tokens": len(prompt), "token_ids": new[:length], "text": text}


def _stopped(tokenizer: Any, strings: str | list[str] | None, sequences: Tensor, prompt: int) -> list[int]:
    """How many new tokens of each sequence come before it is filled up behind a stop string, that string's included."""
    rows, columns = sequences.shape
    ends = [columns - prompt] * rows
    if strings is not None:
        stop, on_host = StopStringCriteria(tokenizer, strings), sequences.cpu()
        for end in range(columns, prompt, -1):
            found = stop(on_host[:, :end], None).tolist()
            ends = [end - prompt if hit else before for hit, before in zip(found, ends, strict=True)]
    return ends


def _options(
    checkpoint: GenerationConfig, config: PretrainedConfig, tokenizer: Any, max_new_tokens: int, sampling: Sampling
) -> dict[str, Any]:
    """Arguments for ``Engine.generate``. What ends a text, and what fills it up then, is the checkpoint's, else the
    tokenizer's."""
    ends = _ids(checkpoint.eos_token_id) or _ids(tokenizer.eos_token_id)
    # A tokenizer may have a padding token that the model does not have.
    vocabulary = range(config.get_text_config().vocab_size)
    pad_id = next(i for i in (*_ids(tokenizer.pad_token_id), *ends, 0) if i in vocabulary)
    stop = {} if checkpoint.stop_strings is None else {"tokenizer": tokenizer}
    chosen = {"max_new_tokens": max_new_tokens, "pad_token_id": pad_id, "eos_token_id": ends or None}
    return {**chosen, **stop, **sampling.options()}


def check_settings(
    run: RunConfig,
    tokenizer: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    say: Callable[[str], None],
) -> None:
    """Refuse, before weights load, what the checkpoint's own settings ask for and ``generate`` does not serve; say what
    the command's options decide otherwise.

    Raises:
        CheckpointError, InputError: with the setting and its file.
    """
    checkpoint, config = read_generation_config(run.checkpoint), read_config(run.checkpoint)
    origin = f" of the checkpoint's {GENERATION_CONFIG_NAME}"
    if (why := problem("eos_token_id", checkpoint.eos_token_id, sampled=False, origin=origin)) is not None:
        raise InputError(why)
    if (line := overridden(vars(checkpoint), sampling)) is not None:
        say(line)
    options = _options(checkpoint, config, tokenizer, max_new_tokens, sampling)
    check_before_loading(config, checkpoint, options, max(len(prompts), run.parallel.dp_size))


def check_room(run: RunConfig, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Raise InputError, before weights load, where no rank has the memory for the cache of these prompts."""
    dims, longest = model_dims(read_config(run.checkpoint)), max(map(len, prompts))
    check_cache_fits(run, dims, max(len(prompts), run.parallel.dp_size), longest, max_new_tokens, local_device())


def _ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
