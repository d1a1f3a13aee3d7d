"""What ``generate`` is asked, checked on every rank before any work: settings, mask and cache."""

# Shapes: B rows of the caller's batch, C all columns, those that are cached already among them.
from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PretrainedConfig, TextStreamer
from transformers.generation import BaseStreamer

from ds_ring.engine.batch import pack
from ds_ring.engine.cache_fit import check_cache_fits
from ds_ring.engine.call_arguments import as_ids, as_mask
from ds_ring.engine.model_runner import CachedRunner
from ds_ring.errors import InputError
from ds_ring.hf.cache import BROKEN, ShardedCache
from ds_ring.hf.generation_adapter import GenerationAdapter
from ds_ring.hf.generation_callbacks import OF_CALLER, check_callbacks, kinds
from ds_ring.hf.generation_settings import SPREAD, Asked, admit, check_mode, check_processors, origin
from ds_ring.kv_cache.shard import KVCacheShard
from ds_ring.planning.validation import check_positions
from ds_ring.transport.solo import SoloTransport

DEFAULT_NEW_TOKENS = 20
"""transformers' own, where nothing says how long."""
REFUSED = (
    "assistant_model", "assistant_tokenizer", "custom_generate", "negative_prompt_ids",
    "negative_prompt_attention_mask", "inputs_embeds", "position_ids", "token_type_ids", "synced_gpus",
)  # fmt: skip
"""Arguments of transformers' ``generate`` beside its settings, which are in ``hf/generation_fields.py``, that are not
served; those that are: ``hf/generation_callbacks.py``."""


@dataclass(frozen=True)
class GenerateArgs:
    """What a call of ``generate`` asks for, checked.

    Attributes:
        input_ids: [B, C], int64, as they were given otherwise.
        settings: transformers' own, with every default filled in.
        mask_BC: which columns hold a token, bool, on the CPU.
        cache: the caller's, or an empty one.
        new_tokens: how many may be generated.
        prefill_chunk: prompt tokens of each sequence that run at a time; 0: the whole prompt.
    """

    input_ids: Tensor
    settings: GenerationConfig
    mask_BC: Tensor
    cache: ShardedCache
    new_tokens: int
    prefill_chunk: int


def check_generate_args(
    runner: CachedRunner,
    adapter: GenerationAdapter,
    input_ids: Tensor | None,
    inputs: Tensor | None,
    attention_mask: Tensor | None,
    generation_config: GenerationConfig | None,
    past_key_values: Cache | None,
    streamer: BaseStreamer | None,
    progress: object,
    options: dict[str, Any],
) -> GenerateArgs:
    """Check the arguments of ``generate``, and that all ranks were given the same.

    Raises:
        InputError: what cannot be served, named. DisagreementError: ranks were given different things.
    """
    world = runner.mesh["world"]
    try:
        if input_ids is not None and inputs is not None:
            raise InputError("generate was given input_ids and inputs, which are two names of the same; give one")
        input_ids = as_ids(inputs if input_ids is None else input_ids)
        attention_mask = as_mask(attention_mask)
        check_callbacks(options, streamer, progress)
        settings = settings_of(
            adapter, runner.model.generation_config, generation_config, options, input_ids.cpu(), world.rank == 0
        )
        mask_BC = _mask(adapter, settings, input_ids, attention_mask)
        rows = (settings.num_return_sequences or 1) * len(mask_BC)
        asked = Asked.of(runner.model.generation_config, generation_config, options)
        _check_padding(settings, asked, rows, runner.dims.vocab_size)
        cache = _cache(runner, past_key_values, mask_BC, input_ids, settings)
        max_length = _max_length(adapter, generation_config, options)
        new_tokens = _check_length(runner, mask_BC, input_ids, settings.max_new_tokens, max_length)
        longest = int(mask_BC.sum(1).max())
        check_cache_fits(runner.run_config, runner.dims, rows, longest, new_tokens, runner.device, runner.weight_bytes)
        if isinstance(streamer, TextStreamer) and mask_BC.shape[0] > 1:
            # It would raise on rank 0 alone, with the others on their way.
            raise InputError(f"{type(streamer).__name__} takes one row, the batch has {mask_BC.shape[0]}")
        digest = _digest(runner, input_ids, mask_BC, cache)
        if past := cache.get_seq_length():
            cache.revise(mask_BC[:, :past].repeat_interleave(settings.num_return_sequences or 1, 0))
    except InputError as error:
        # Where only some ranks refuse, the others must hear of it rather than wait for them.
        world.agree(input_ids=f"unusable ones: {error}")
        raise
    plain = {k: v if isinstance(v, int | float | str | list | None) else repr(v) for k, v in vars(settings).items()}
    prefill_chunk = adapter.prefill_chunk_size or runner.run_config.workload.prefill_chunk
    plain |= {"max_new_tokens": new_tokens, "prefill_chunk_size": prefill_chunk}
    plain |= kinds(options)
    world.agree(input_ids=digest, **{f"generate's {name}": value for name, value in plain.items()})
    return GenerateArgs(input_ids, settings, mask_BC, cache, new_tokens, prefill_chunk)


def settings_of(
    adapter: GenerationAdapter,
    checkpoint: GenerationConfig,
    generation_config: GenerationConfig | None,
    options: dict[str, Any],
    input_ids: Tensor,
    say: bool,
) -> GenerationConfig:
    """Everything transformers will go by, with every default filled in.

    Args:
        checkpoint: what the checkpoint itself asks for.
        say: whether this rank says what is left out.

    Raises:
        InputError: what is not served, or not usable, by name.
    """
    # By identity: tensors that are compared answer with tensors.
    if named := [name for name in REFUSED if options.get(name) is not None and options[name] is not False]:
        raise InputError(f"generate does not serve {', '.join(named)} {SPREAD}")
    asked = Asked.of(checkpoint, generation_config, options)
    admit(asked, adapter.config.get_text_config().vocab_size, say)
    settings: GenerationConfig
    try:
        settings, others = adapter._prepare_generation_config(generation_config, **options)
        adapter._validate_model_kwargs({k: v for k, v in others.items() if k not in (*OF_CALLER, *REFUSED)})
        adapter._prepare_special_tokens(settings, True, device=torch.device("cpu"), batch_size=input_ids.shape[0])
    except ValueError as error:
        raise InputError(f"transformers refuses the options of generate: {error}") from None
    check_mode(settings, asked)
    check_processors(adapter, settings, input_ids, options.get("tokenizer"))
    return settings


def check_before_loading(
    config: PretrainedConfig, checkpoint: GenerationConfig, options: dict[str, Any], sequences: int
) -> None:
    """What ``check_generate_args`` will say of the settings of such a call, before there is a model.

    Args:
        config, checkpoint: what the checkpoint's config.json and generation_config.json say.
        sequences: of the batch.

    Raises:
        InputError: what is not served, or not usable, by name.
    """
    model: Any = SimpleNamespace(config=config, generation_config=checkpoint, dtype=torch.float32)
    adapter = GenerationAdapter(model, torch.device("cpu"), _no_forward, SoloTransport(), torch.ones(()).bool())
    settings = settings_of(adapter, checkpoint, None, options, torch.zeros(1, 1, dtype=torch.long), say=False)
    _check_padding(settings, Asked.of(checkpoint, None, options), sequences, config.get_text_config().vocab_size)


def _no_forward(*args: Any) -> Tensor:
    raise AssertionError("there is no model")


def _check_padding(settings: GenerationConfig, asked: Asked, sequences: int, vocab_size: int) -> None:
    """Raise InputError where rows that end early would be filled with what is no token."""
    pad = settings._pad_token_tensor  # where none is given, the first that ends a row
    if sequences > 1 and settings._eos_token_tensor is not None and not 0 <= int(pad) < vocab_size:
        given = asked.effective.get("pad_token_id") is not None
        source = origin("pad_token_id", asked) if given else ", the first of eos_token_id,"
        raise InputError(
            f"pad_token_id={int(pad)}{source} is outside the vocabulary of {vocab_size}, and rows that end early are "
            f"filled with it; give a pad_token_id"
        )


def _mask(
    adapter: GenerationAdapter, settings: GenerationConfig, input_ids: Tensor, attention_mask: Tensor | None
) -> Tensor:
    """[B, all columns], bool, on the CPU; where none is given, as transformers infers it from padding tokens."""
    if attention_mask is None:
        attention_mask = adapter._prepare_attention_mask_for_generation(input_ids.cpu(), settings, {})
    if attention_mask.dim() != 2 or attention_mask.shape[0] != input_ids.shape[0]:
        raise InputError(f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}")
    mask_BC = attention_mask.cpu() != 0
    if not mask_BC[:, -1].all():
        sequence = int((~mask_BC[:, -1]).nonzero()[0])
        raise InputError(
            f"row {sequence} of the batch ends in padding: generate appends to the last column, so pad on the left "
            f'(tokenizer.padding_side = "left")'
        )
    return mask_BC


def _cache(
    runner: CachedRunner, given: Cache | None, mask_BC: Tensor, input_ids: Tensor, settings: GenerationConfig
) -> ShardedCache:
    """The caller's cache, or an empty one."""
    copies = settings.num_return_sequences or 1
    sequences, columns = copies * mask_BC.shape[0], mask_BC.shape[1]
    if given is None:
        if input_ids.shape[1] != columns:
            raise InputError(f"attention_mask has {columns} columns, input_ids {input_ids.shape[1]}")
        mine = runner.sequences_of_replica(sequences)
        sp = runner.mesh["sp"]
        cache_shard = KVCacheShard(len(mine), len(runner.decoder.layers), sp.rank, sp.size, runner.device)
        return ShardedCache(runner, cache_shard, mine)
    if not isinstance(given, ShardedCache) or given.owner is not runner:
        raise InputError(f"past_key_values is a {type(given).__name__} that another model made; give this engine's own")
    if not given.whole:
        raise InputError(BROKEN)
    past = given.get_seq_length()
    if past and given.mask_BC.shape[0] != sequences:
        raise InputError(f"past_key_values holds {given.mask_BC.shape[0]} rows, the batch {sequences}")
    if columns <= past:
        raise InputError(
            f"past_key_values holds {past} columns already, and the batch has {columns}: give the whole conversation, "
            f"with at least one token more"
        )
    if input_ids.shape[1] not in (columns, columns - past):
        raise InputError(
            f"input_ids have {input_ids.shape[1]} columns, where attention_mask has {columns} and past_key_values "
            f"{past}: give all {columns}, or the last {columns - past}"
        )
    if past and input_ids.shape[1] == columns:
        _check_same_text(given, *(t[:, :past].repeat_interleave(copies, 0) for t in (input_ids.cpu(), mask_BC)))
    return given


def _check_same_text(cache: ShardedCache, ids_BC: Tensor, mask_BC: Tensor) -> None:
    """Raise InputError where the cache is of another conversation than the whole one that is given."""
    if (difference := cache.first_difference(ids_BC, mask_BC)) is not None:
        row, column, held, given = difference
        raise InputError(
            f"past_key_values is of another text: in column {column} of row {row} it holds token {held}, and input_ids "
            f"{given}; give the conversation as it was, crop the cache to {column} columns, or begin without it"
        )


def _max_length(
    adapter: GenerationAdapter, generation_config: GenerationConfig | None, options: dict[str, Any]
) -> int | None:
    """As it was given. The settings do not tell: transformers puts its default of new tokens where nobody gave one."""
    configs = (generation_config, adapter.generation_config)
    given = [options.get("max_length"), *(config.max_length for config in configs if config is not None)]
    return next((length for length in given if length is not None), None)


def _check_length(
    runner: CachedRunner, mask_BC: Tensor, input_ids: Tensor, max_new_tokens: int | None, max_length: int | None
) -> int:
    """How many tokens may be generated."""
    longest = int(mask_BC.sum(1).max())
    if max_new_tokens is not None:
        new = max_new_tokens
    elif max_length is not None:
        new = max_length - input_ids.shape[1]
    else:
        new = DEFAULT_NEW_TOKENS
    if new < 1:
        raise InputError(f"nothing to generate: {input_ids.shape[1]} tokens of input leave max_new_tokens={new}")
    check_positions(longest, new, runner.dims)
    return new


def _digest(runner: CachedRunner, input_ids: Tensor, mask_BC: Tensor, cache: ShardedCache) -> str:
    """What ranks compare; checks the new tokens on the way."""
    new = slice(cache.get_seq_length(), None)
    ids_BC = input_ids.cpu()[:, -mask_BC[:, new].shape[1] :]
    batch, _ = pack(ids_BC, mask_BC[:, new], None, runner.dims)
    hidden = sha256((~mask_BC[:, : new.start]).numpy().tobytes()).hexdigest()[:12] if new.start else "none"
    return f"{batch.digest()} behind {new.start} columns, hidden among them: {hidden}"
