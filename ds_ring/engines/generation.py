"""transformers' ``generate`` over an engine: what is refused, what ranks agree on, and each step's forward."""

# Shapes: B rows of the caller's batch, b of this replica, T columns, L packed tokens of the longest row, V vocabulary.
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, TextStreamer
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput, GenerationMode

from ds_ring.attention.positions import EMPTY
from ds_ring.attention.step import Step
from ds_ring.attention.store import KVStore
from ds_ring.engines.batch import pack
from ds_ring.engines.cached_batch import CachedBatch, chunks
from ds_ring.engines.gather import gather_replicas
from ds_ring.errors import InputError, NumericsError
from ds_ring.hf.cache import ShardedCache
from ds_ring.hf.facade import Facade
from ds_ring.transport.base import Transport

if TYPE_CHECKING:
    from ds_ring.engines.base import Engine

DEFAULT_NEW_TOKENS = 20
"""transformers' own, where nothing says how long."""
REFUSED = (
    "assistant_model", "custom_generate", "negative_prompt_ids", "negative_prompt_attention_mask", "guidance_scale",
    "prompt_lookup_num_tokens", "cache_implementation", "inputs_embeds", "position_ids", "token_type_ids",
    "synced_gpus", "output_attentions", "output_hidden_states", "token_healing",
)  # fmt: skip


def generate(
    engine: Engine,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    generation_config: GenerationConfig | None,
    past_key_values: Cache | None,
    streamer: BaseStreamer | None,
    options: dict[str, Any],
) -> Tensor | GenerateDecoderOnlyOutput:
    """See ``Engine.generate``."""
    run = _Run(engine)
    facade = Facade(engine.model, engine.device, run, engine.mesh["world"])
    world = engine.mesh["world"]
    try:
        settings = _settings(facade, generation_config, options)
        mask_BT = _mask(facade, settings, input_ids, attention_mask)
        cache = _cache(engine, past_key_values, mask_BT, input_ids, settings)
        _check_length(engine, mask_BT, input_ids, settings)
        if isinstance(streamer, TextStreamer) and mask_BT.shape[0] > 1:
            # It would raise on rank 0 alone, with the others on their way.
            raise InputError(f"{type(streamer).__name__} takes one row, the batch has {mask_BT.shape[0]}")
        digest = _digest(engine, input_ids, mask_BT, cache)
        if cache.get_seq_length():
            cache.revise(mask_BT[:, : cache.get_seq_length()])
    except InputError as error:
        # Where only some ranks refuse, the others must hear of it rather than wait for them.
        world.agree(input_ids=f"unusable ones: {error}")
        raise
    plain = {k: v for k, v in vars(settings).items() if isinstance(v, int | float | str | list | None)}
    world.agree(input_ids=digest, **{f"generate's {name}": value for name, value in plain.items()})
    with _one_generator(world, engine.device, settings.do_sample):
        result: Tensor | GenerateDecoderOnlyOutput = facade.generate(
            input_ids.to(engine.device),
            attention_mask=mask_BT.long().to(engine.device),
            generation_config=generation_config,
            past_key_values=cache,
            streamer=streamer if world.rank == 0 else None,
            **options,
        )
    if not bool(run.fine):
        raise NumericsError("the model gave NaN or infinity for a generated token; check the weights, or take bf16")
    return result


class _Run:
    """The facade's forward: new columns of all rows in, logits of the last column out, alike on every rank."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.fine = torch.ones((), dtype=torch.bool, device=engine.device)
        """Whether all logits so far are finite; on the device, so that no step waits for it."""
        self._prefilled: ShardedCache | None = None
        self._seen_b1 = self._first_b1 = torch.empty(0)

    @torch.inference_mode()
    def __call__(self, ids_BT: Tensor, mask_BT: Tensor | None, cache: ShardedCache) -> Tensor:
        if ids_BT.shape[1] == 1 and cache is self._prefilled:
            logits_bV = self._decode(ids_BT, cache)
        else:
            logits_bV = self._prefill(ids_BT, mask_BT, cache)
        logits_BV = gather_replicas(logits_bV, ids_BT.shape[0], self._engine.mesh["dp"])
        self.fine = self.fine & torch.isfinite(logits_BV).all()
        return logits_BV

    def _decode(self, ids_B1: Tensor, cache: ShardedCache) -> Tensor:
        """One column more. Nothing here waits for the device: what is needed on the host is known beforehand."""
        store, own = cache.store, slice(cache.rows.start, cache.rows.stop)
        owner, starts = store.next_owner, tuple(store.used)
        store.used[owner] += 1
        places_b1 = cache.get_seq_length() - self._first_b1
        step = Step(store, slice(0, len(cache.rows)), places_b1, starts, tuple(store.used), replicated=True)
        logits_bV = self._engine.decode(ids_B1[own], self._seen_b1, step)
        cache.extend(torch.ones(ids_B1.shape, dtype=torch.bool))
        self._seen_b1 = self._seen_b1 + 1
        return logits_bV

    def _prefill(self, ids_BT: Tensor, mask_BT: Tensor | None, cache: ShardedCache) -> Tensor:
        engine, past = self._engine, cache.get_seq_length()
        ids_BT = ids_BT.cpu()
        if mask_BT is None:
            mask_BT = torch.ones(ids_BT.shape[0], past + ids_BT.shape[1], dtype=torch.bool)
        mask_BT = mask_BT.cpu().bool()
        new_BT = mask_BT[:, past:]
        positions_BT = (mask_BT.long().cumsum(1) - 1)[:, past:] * new_BT
        whole, columns_BL = pack(ids_BT, new_BT, positions_BT, engine.shape)
        cache.extend(new_BT)
        places_BL = torch.where(columns_BL < 0, EMPTY, columns_BL + past - cache.first_B[:, None]).int()
        batch, own = whole.split(cache.rows), slice(cache.rows.start, cache.rows.stop)
        work = [
            part
            for parts in chunks(
                batch, places_BL[own], cache.store, size=engine.config.workload.prefill_chunk,
                rows_at_a_time=engine.config.workload.micro_batch_size, slots=engine.slots,
            )
            for part in parts
        ]  # fmt: skip
        self._seen_b1 = mask_BT[own].sum(1, keepdim=True).to(engine.device)
        self._first_b1 = cache.first_B[own, None].int().to(engine.device)
        self._prefilled = cache
        return self._last_logits(work, batch.lengths, cache)

    def _last_logits(self, work: list[CachedBatch], lengths: tuple[int, ...], cache: ShardedCache) -> Tensor:
        """Run all chunks; logits [b, V] of each row's last token."""
        done = [0] * len(lengths)
        last: list[list[tuple[int, int]]] = []
        for part in work:
            found = []
            for row, n in zip(range(part.store_rows.start, part.store_rows.stop), part.lengths, strict=True):
                done[row] += n
                if n and done[row] == lengths[row]:
                    found.append((row, n - 1))
            last.append(found)
        keep = [torch.tensor(sorted({at for _, at in found}), dtype=torch.long) for found in last]
        logits: dict[int, Tensor] = {}
        shards = self._engine.checked_forward(list(work), keep, want_hidden=False)
        for shard, part, kept_k, found in zip(shards, work, keep, last, strict=True):
            if not found:
                continue
            whole_BkV = self._engine.assemble(shard.logits_BkV, part, kept_k, (self._engine.shape.vocab_size,))
            for row, at in found:
                logits[row] = whole_BkV[row - part.store_rows.start, int((kept_k == at).nonzero()[0])]
        # Pipeline stages pass results on by themselves; tensor-parallel ranks each computed their own.
        return self._engine.mesh["tp"].broadcast(torch.stack([logits[row] for row in range(len(lengths))]), 0)


def _settings(facade: Facade, generation_config: GenerationConfig | None, options: dict[str, Any]) -> GenerationConfig:
    """Everything transformers will go by, as far as we serve it."""
    given = {**(generation_config.to_dict() if generation_config is not None else {}), **options}
    asked = [name for name in REFUSED if given.get(name) not in (None, False)]
    if asked:
        raise InputError(f"generate does not serve {', '.join(asked)} with a cache that is spread over ranks")
    settings: GenerationConfig
    try:
        settings, _ = facade._prepare_generation_config(generation_config, **options)
    except ValueError as error:
        raise InputError(f"transformers refuses the options of generate: {error}") from None
    mode = settings.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise InputError(
            f"generate does not serve {mode.value} (num_beams={settings.num_beams}) with a cache that is spread over "
            f"ranks; it serves greedy search and sampling: num_beams=1"
        )
    if settings.use_cache is False:
        raise InputError("use_cache=False: without a cache every token would cost a forward of the whole text")
    if settings.prefill_chunk_size is not None:
        raise InputError(
            f"prefill_chunk_size={settings.prefill_chunk_size} belongs into the configuration: "
            f'"workload": {{"prefill_chunk": {settings.prefill_chunk_size}}}'
        )
    return settings


def _mask(facade: Facade, settings: GenerationConfig, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """[B, all columns], bool, on the CPU; where none is given, as transformers infers it from padding tokens."""
    if input_ids.dim() != 2 or input_ids.is_floating_point() or 0 in input_ids.shape:
        raise InputError(
            f"input_ids must be whole numbers of shape [batch, length], at least one of each, not "
            f"{tuple(input_ids.shape)} {input_ids.dtype}"
        )
    if attention_mask is None:
        facade._prepare_special_tokens(settings, True, device=input_ids.device, batch_size=input_ids.shape[0])
        attention_mask = facade._prepare_attention_mask_for_generation(input_ids, settings, {})
    if attention_mask.dim() != 2 or attention_mask.shape[0] != input_ids.shape[0]:
        raise InputError(f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}")
    mask_BT = attention_mask.cpu() != 0
    if not mask_BT[:, -1].all():
        row = int((~mask_BT[:, -1]).nonzero()[0])
        raise InputError(
            f"row {row} of the batch ends in padding: generate appends to the last column, so pad on the left "
            f'(tokenizer.padding_side = "left")'
        )
    return mask_BT


def _cache(
    engine: Engine, given: Cache | None, mask_BT: Tensor, input_ids: Tensor, settings: GenerationConfig
) -> ShardedCache:
    """The caller's cache, or an empty one."""
    copies = settings.num_return_sequences or 1
    rows, columns = copies * mask_BT.shape[0], mask_BT.shape[1]
    if given is None:
        if input_ids.shape[1] != columns:
            raise InputError(f"attention_mask has {columns} columns, input_ids {input_ids.shape[1]}")
        mine = engine.rows_of(rows)
        sp = engine.mesh["sp"]
        store = KVStore(len(mine), len(engine.anatomy.layers), sp.rank, sp.size, engine.device)
        return ShardedCache(engine, store, mine)
    if not isinstance(given, ShardedCache) or given.owner is not engine:
        raise InputError(f"past_key_values is a {type(given).__name__} that another model made; give this engine's own")
    past = given.get_seq_length()
    if past and given.mask_BT.shape[0] != rows:
        raise InputError(f"past_key_values holds {given.mask_BT.shape[0]} rows, the batch {rows}")
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
    return given


def _check_length(engine: Engine, mask_BT: Tensor, input_ids: Tensor, settings: GenerationConfig) -> None:
    longest = int(mask_BT.sum(1).max())
    if settings.max_new_tokens is not None:
        new = settings.max_new_tokens
    elif settings.max_length is not None and settings.max_length != DEFAULT_NEW_TOKENS:
        new = settings.max_length - input_ids.shape[1]
    else:
        new = DEFAULT_NEW_TOKENS
    if new < 1:
        raise InputError(f"nothing to generate: {input_ids.shape[1]} tokens of input leave max_new_tokens={new}")
    limit = engine.shape.max_positions
    if limit is not None and longest + new > limit:
        raise InputError(
            f"{longest} tokens of input + max_new_tokens={new} exceed the model's max_position_embeddings={limit}; "
            f"shorten either"
        )


def _digest(engine: Engine, input_ids: Tensor, mask_BT: Tensor, cache: ShardedCache) -> str:
    """What ranks compare; checks the new tokens on the way."""
    new = slice(cache.get_seq_length(), None)
    ids_BT = input_ids.cpu()[:, -mask_BT[:, new].shape[1] :]
    batch, _ = pack(ids_BT, mask_BT[:, new], None, engine.shape)
    return f"{batch.digest()} behind {cache.get_seq_length()} columns"


@contextmanager
def _one_generator(world: Transport, device: torch.device, sampled: bool) -> Iterator[None]:
    """Inside the block every rank draws from rank 0's random state.

    Ranks that were in that state before go on from it afterwards, as rank 0 does; others get their own back.
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
