"""Text from prompts: read and tokenized, generated in one batch, timed, and told token by token."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TextStreamer
from transformers.generation import BaseStreamer

from ds_ring.config import RunConfig
from ds_ring.engine.engine import Engine
from ds_ring.engine.model_runner import CachedRunner
from ds_ring.errors import InputError
from ds_ring.hf.cache import ShardedCache
from ds_ring.hf.checkpoint import Checkpoint
from ds_ring.hf.dims import model_dims, read_config
from ds_ring.planning.validation import check_positions
from ds_ring.utils.corpus import load_tokenizer, read_text
from ds_ring.utils.hardware import copy_rate, device_name, held_memory_gib

SAY_EVERY_S = 1.0
"""Between lines that tell how far prompts are, at least."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; ``temperature`` 0: the likeliest."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def options(self) -> dict[str, Any]:
        # A checkpoint's own settings may ask for beams, which are not served.
        if self.temperature == 0:
            return {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        chosen = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {"do_sample": True, "num_beams": 1, **chosen}


def check(max_new_tokens: int, sampling: Sampling, passes: int = 1) -> None:
    """Raise InputError for what no model could do."""
    if passes < 1:
        raise InputError(f"passes={passes} must be at least 1")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not 0 <= sampling.temperature < float("inf"):
        raise InputError(f"temperature={sampling.temperature} must be a number from 0 on; 0 takes the likeliest token")
    if not 0 < sampling.top_p <= 1:
        raise InputError(f"top_p={sampling.top_p} must be above 0 and at most 1")
    if sampling.top_k < 0:
        raise InputError(f"top_k={sampling.top_k} must be at least 0; 0 leaves it out")
    for name, value, all_tokens in (("top_p", sampling.top_p, 1), ("top_k", sampling.top_k, 0)):
        if sampling.temperature == 0 and value != all_tokens:
            raise InputError(
                f"{name}={value} counts with a temperature alone: temperature=0 takes the likeliest token; give a "
                f"temperature, or leave {name} out"
            )


def read_prompts(config: RunConfig, prompts: Sequence[str], files: Sequence[str]) -> tuple[Any, list[list[int]]]:
    """(tokenizer, tokens of every prompt and then of every file).

    Raises:
        InputError: no prompt, an empty one, or a file that cannot be read. CheckpointError: no checkpoint, or no
            tokenizer in it.
    """
    texts = [*prompts, *read_text(files)]
    if not texts:
        raise InputError("no prompt: give --prompt TEXT… or --prompt-file FILE…")
    Checkpoint.open(config.checkpoint)
    tokenizer = load_tokenizer(config.checkpoint)
    rows: list[list[int]] = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    for number, (text, row) in enumerate(zip(texts, rows, strict=True)):
        if not text.strip() or not row:  # a tokenizer may begin even an empty text with a token of its own
            raise InputError(f"prompt {number + 1} of {len(rows)} is empty")
    return tokenizer, rows


def check_lengths(config: RunConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise InputError where the model has too few positions; before any weight is read."""
    check_positions(max(map(len, prompts)), max_new_tokens, model_dims(read_config(config.checkpoint)))


def sized(config: RunConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> RunConfig:
    """``config`` with the prompts' own number and length where the planner goes by those and they are not given."""
    if not config.parallel.auto:
        return config
    own = {"batch_size": len(prompts), "max_length": max(map(len, prompts)) + max_new_tokens}
    given = config.workload.model_fields_set
    return RunConfig.load(config, **{name: value for name, value in own.items() if name not in given})


def left_padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(token ids, mask), both [B, C], of rows padded at their beginnings."""
    columns = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (columns - len(row)) + list(row) for row in rows])
    return ids, torch.tensor([[0] * (columns - len(row)) + [1] * len(row) for row in rows])


def run(
    engine: Engine,
    tokenizer: Any,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    say: Callable[[str], None],
    stream: bool,
) -> dict[str, Any]:
    """Generate for all prompts at once.

    ``stream``: write the text to standard error as it comes, where there is one prompt.

    Returns:
        ``{"ttft_ms", "decode_tpot_ms", "decode_over_floor", "tokens_per_second", …, "completions": [{prompt_tokens,
        token_ids, text}]}``, in the order of ``prompts``: time to the first token; (whole time - ttft) / (steps - 1),
        None for a single step; the same over ``step_floor_s``; tokens of all rows over the whole time.
    """
    topology = engine.mesh.topology
    assert isinstance(engine.runner, CachedRunner)
    ends = _ids(engine.model.generation_config.eos_token_id) or _ids(tokenizer.eos_token_id)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    # Replicas without a prompt of their own repeat the first; what they find is left out.
    ids, mask = left_padded(prompts + prompts[:1] * (topology.dp - len(prompts)), pad_id)
    text = TextStream(tokenizer) if stream and len(ids) == 1 else None
    prompt_tokens = sum(map(len, prompts))
    clock = Clock(text, prompt_tokens, say)
    say(f"{topology.label()}: prefill of {prompt_tokens:,} tokens in {len(prompts)} rows")
    torch.manual_seed(sampling.seed)
    engine.settle()
    engine.meet()
    clock.start()
    found: Any = engine.generate(
        ids, mask, max_new_tokens=max_new_tokens, pad_token_id=pad_id, eos_token_id=sorted(ends) or None,
        streamer=clock, progress=clock.prefilled, return_dict_in_generate=True, **sampling.options(),
    )  # fmt: skip
    engine.settle()
    total_s = time.perf_counter() - clock.started
    new = found.sequences[: len(prompts), ids.shape[1] :].tolist()
    completions = [_completion(tokenizer, prompt, row, ends) for prompt, row in zip(prompts, new, strict=True)]
    tokens, steps = sum(len(c["token_ids"]) for c in completions), len(new[0])
    assert isinstance(found.past_key_values, ShardedCache)
    cache_bytes = found.past_key_values.memory_bytes()
    del found
    held, floor_s = max(engine.gather(cache_bytes)), step_floor_s(engine, cache_bytes)
    decode_s = (total_s - clock.ttft_s) / (steps - 1) if steps > 1 else None
    return {
        "layout": topology.label(),
        "decode": "sliced" if engine.runner.decodes_sliced else "whole",
        "gpus": topology.world_size,
        "device": device_name(engine.device),
        "dtype": engine.run_config.dtype,
        "ttft_ms": 1e3 * clock.ttft_s,
        "decode_tpot_ms": None if decode_s is None else 1e3 * decode_s,
        "decode_floor_ms": 1e3 * floor_s,
        "decode_over_floor": None if decode_s is None else decode_s / floor_s,
        "tokens_per_second": tokens / total_s,
        "prefill_tokens_per_second": prompt_tokens / clock.ttft_s,
        "cache_gib_per_rank": held / 2**30,
        "completions": completions,
    }


def summary(found: dict[str, Any]) -> str:
    """What ``run`` found, in a line."""
    step_ms = found["decode_tpot_ms"]
    steps = "" if step_ms is None else f"{step_ms:.2f} ms a token, "
    return (
        f"first token after {found['ttft_ms']:,.0f} ms, {steps}{found['tokens_per_second']:,.1f} tok/s, "
        f"cache {found['cache_gib_per_rank']:.3f} GiB a rank"
    )


def step_floor_s(engine: Engine, cache_bytes: int) -> float:
    """The least time of a step, by what has to be read: a rank's share of the weights and its cache, at the rate of a
    copy. Of the ranks that share a step's work the slowest counts; stages, of which a token passes one after the other,
    add up; replicas do not wait for each other's layers, and the slowest counts again."""
    topology, own = engine.mesh.topology, (share_of_weights(engine) + cache_bytes) / copy_rate(engine.device)
    stages: dict[tuple[int, int], float] = {}
    for rank, seconds in enumerate(engine.gather(own)):
        at = topology.coordinates(rank)
        stage = at["dp"], at["pp"]
        stages[stage] = max(seconds, stages.get(stage, 0.0))
    return max(sum(stages[replica, stage] for stage in range(topology.pp)) for replica in range(topology.dp))


def share_of_weights(engine: Engine) -> float:
    """Bytes of this rank's weights that a token needs, over the ranks that share a sequence: all but embeddings that
    are not the head too, of which it takes a row. Of mixtures of experts, all are counted."""
    head = getattr(engine.model.get_output_embeddings(), "weight", None)  # a stage before the last has none
    tables = [module.weight for module in engine.model.modules() if isinstance(module, nn.Embedding)]
    looked_up = {id(weight) for weight in tables if weight is not head}
    read = sum(p.nbytes for p in engine.model.parameters() if id(p) not in looked_up)
    return read / engine.mesh["sp"].size


def passes_to_look_at(passes: int) -> set[int]:
    """Of so many, those after which memory is recorded: 1, 10, 100, …, and the last."""
    return {10**power for power in range(len(str(passes)))} | {passes}


def held_gib(engine: Engine) -> float:
    """What the fullest rank holds between generations: GPU memory in tensors, or resident host memory."""
    return max(engine.gather(held_memory_gib(engine.device)))


def growth(held_gib_after_pass: dict[str, float]) -> float:
    """What was held after the last pass, over that after the tenth; of ten or fewer, after the first."""
    last = max(map(int, held_gib_after_pass))
    return held_gib_after_pass[str(last)] / held_gib_after_pass["10" if last > 10 else "1"]


class Clock(BaseStreamer):
    """Hears of every chunk of the prompts and of every step on rank 0, and passes tokens on; elsewhere it stays at
    nan."""

    def __init__(self, text: BaseStreamer | None, prompt_tokens: int, say: Callable[[str], None]) -> None:
        self._text, self._prompt_tokens, self._say = text, prompt_tokens, say
        self._heard = 0
        self._said = 0.0
        self.started, self.ttft_s = 0.0, float("nan")

    def start(self) -> None:
        self.started = self._said = time.perf_counter()

    def prefilled(self, done: int, whole: int) -> None:
        now = time.perf_counter()
        if done < whole and now - self._said >= SAY_EVERY_S:
            self._said = now
            self._say(f"prefill: {done:,} of {whole:,} tokens, {done / (now - self.started):,.0f} tok/s")

    def put(self, value: Tensor) -> None:
        self._heard += 1
        if self._heard == 2:  # the first is the prompt
            self.ttft_s = time.perf_counter() - self.started
            self._say(f"prefill: {self.ttft_s:.2f} s, {self._prompt_tokens / self.ttft_s:,.0f} tok/s")
        if self._text is not None:
            self._text.put(value)

    def end(self) -> None:
        if self._text is not None:
            self._text.end()


class TextStream(TextStreamer):
    """Text to standard error as soon as it is certain; standard output stays free for the result."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(text, end="\n" if stream_end else "", file=sys.stderr, flush=True)


def _completion(tokenizer: Any, prompt: list[int], new: list[int], ends: set[int]) -> dict[str, Any]:
    """A row's tokens as far as the one that ends it, which counts."""
    length = next((i + 1 for i, token in enumerate(new) if token in ends), len(new))
    text = tokenizer.decode(new[:length], skip_special_tokens=True)
    return {"prompt_tokens": len(prompt), "token_ids": new[:length], "text": text}


def _ids(value: int | list[int] | None) -> set[int]:
    if value is None:
        return set()
    return set(value) if isinstance(value, list) else {value}
