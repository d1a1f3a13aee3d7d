"""What ``generate`` leaves behind: a conversation goes on from it, and every rank holds its share."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from ds_ring.config import RunConfig
from ds_ring.engine.engine import Engine
from ds_ring.errors import InputError
from ds_ring.hf.cache import ShardedCache
from ds_ring.hf.dims import model_dims
from ds_ring.planning.memory_estimate import cache_bytes
from tests.helpers.generation import (
    GREEDY,
    PROMPT,
    assert_as_alone,
    assert_same,
    by_name,
    llama,
    on_all_ranks_alike,
    padded,
    tokens,
    unsharded,
)
from tests.helpers.mocked_world import outcome, serve
from tests.helpers.tiny_models import ARCHITECTURES, build, shared


@pytest.mark.parametrize("name", ["llama_gqa", "mistral", "gpt_oss"])
@by_name("single", "ring3", "pp2", "dp2_ring2")
def test_a_conversation_goes_on_from_its_cache(name, layout):
    model, (first, mask) = shared(name), padded([PROMPT, 9])
    more = [tokens(2, 11, seed=1), tokens(2, 1, seed=2)]

    def work(engine: Engine) -> list[GenerateDecoderOnlyOutput]:
        found = [engine.generate(first, mask, max_new_tokens=6, **GREEDY)]
        for turn in more:
            ids = torch.cat((found[-1].sequences, turn), 1)
            # The last token of a turn was not run yet: it is a part of the next one.
            seen = torch.cat((mask, torch.ones(2, ids.shape[1] - mask.shape[1]).long()), 1)
            found.append(
                engine.generate(ids, seen, past_key_values=found[-1].past_key_values, max_new_tokens=6, **GREEDY)
            )
        return found

    for turn in zip(*serve(model, work, batch_size=2, micro_batch_size=2, **layout), strict=True):
        got = on_all_ranks_alike(list(turn))
        ids = got.sequences[:, :-6]
        seen = torch.cat((mask, torch.ones(2, ids.shape[1] - mask.shape[1]).long()), 1)
        assert_as_alone(model, ids, seen, got)


@by_name("ring3", "dp2_ring2", "pp2")
def test_a_cache_knows_the_tokens_that_it_holds(layout):
    (ids, mask), more = padded([20, 9]), tokens(2, 5, seed=1)

    def work(engine: Engine) -> list[tuple[Tensor, Tensor, Tensor]]:
        begun = engine.generate(ids, mask, max_new_tokens=4, **GREEDY)
        told = [(begun.sequences, begun.past_key_values.ids_BC, begun.past_key_values.mask_BC)]
        whole, seen = torch.cat((begun.sequences, more), 1), torch.cat((mask, torch.ones(2, 9).long()), 1)
        after = engine.generate(whole, seen, past_key_values=begun.past_key_values, max_new_tokens=3, **GREEDY)
        return [*told, (after.sequences, after.past_key_values.ids_BC, after.past_key_values.mask_BC)]

    for turns in serve(llama(), work, batch_size=2, micro_batch_size=2, **layout):
        for sequences, held, shown in turns:
            assert torch.equal(held, sequences[:, :-1])  # nothing has run the last token yet
            assert torch.equal(shown[:, :20], mask.bool())
            assert shown[:, 20:].all()
            assert shown.shape == held.shape


def test_the_new_part_of_a_conversation_alone_under_a_mask_of_the_whole():
    first, more = tokens(1, 20), tokens(1, 7, seed=1)

    def work(engine: Engine) -> GenerateDecoderOnlyOutput:
        begun = engine.generate(first, max_new_tokens=5, **GREEDY)
        new = torch.cat((begun.sequences[:, -1:], more), 1)
        mask = torch.ones(1, begun.sequences.shape[1] + 7).long()
        return engine.generate(new, mask, past_key_values=begun.past_key_values, max_new_tokens=5, **GREEDY)

    got = on_all_ranks_alike(serve(llama(), work, ring_degree=2))
    begun = unsharded(llama(), first, max_new_tokens=5)
    want = unsharded(llama(), torch.cat((begun.sequences, more), 1), max_new_tokens=5)
    assert torch.equal(got.sequences[:, -5:], want.sequences[:, -5:])


@by_name("ring3", "dp2_ring2", "pp2")
def test_padding_behind_a_row_that_ended_early_is_forgotten_in_the_next_turn(layout):
    ids, more = tokens(2, 20), tokens(2, 4, seed=1)
    text = unsharded(llama(), ids, max_new_tokens=12).sequences[:, 20:]
    # A token that ends row 0 within five steps, and row 1 later, or never.
    end = next(int(t) for t in text[0, 1:5] if t not in text[1, :6])
    ending = GREEDY | {"eos_token_id": end}

    def work(engine: Engine) -> tuple[Tensor, GenerateDecoderOnlyOutput]:
        begun = engine.generate(ids, max_new_tokens=12, **ending)
        new = begun.sequences[:, 20:]
        ended = (new == end).cumsum(1) - (new == end).int() > 0
        mask = torch.cat((torch.ones(2, 20).long(), (~ended).long(), torch.ones(2, 4).long()), 1)
        whole = torch.cat((begun.sequences, more), 1)
        got = engine.generate(whole, mask, past_key_values=begun.past_key_values, max_new_tokens=6, **GREEDY)
        return mask, got

    results = serve(llama(), work, batch_size=2, micro_batch_size=2, **layout)
    mask = results[0][0]
    assert 0 in mask[0]
    got = on_all_ranks_alike([r for _, r in results])
    assert_as_alone(llama(), got.sequences[:, :-6], mask, got)


@pytest.mark.parametrize("prompt", [1, 37])
@by_name("ring3", "ulysses3_ring2")
def test_every_rank_holds_its_share_of_the_cache(layout, prompt):
    ranks = layout.get("ring_degree", 1) * layout.get("ulysses_degree", 1)

    def work(engine: Engine) -> tuple[list[int], int]:
        cache = engine.generate(tokens(2, prompt), max_new_tokens=20, **GREEDY).past_key_values
        assert isinstance(cache, ShardedCache)
        assert cache.get_seq_length() == prompt + 19
        return cache.cache_shard.used, cache.memory_bytes()

    per_slot = 2 * 3 * (2 * 3 * 8 * 4) + 2 * 4  # rows x layers x (k, v: heads x head_dim x fp32), and positions
    for used, memory in serve(llama(), work, micro_batch_size=2, **layout):
        # Prompts are padded to a multiple of what the layout cuts.
        assert prompt + 19 <= sum(used) <= prompt + 19 + 2 * ranks + 2
        assert max(used) - min(used) <= 1
        assert max(used) * per_slot <= memory <= max(64, 1.5 * max(used)) * per_slot


@pytest.mark.parametrize("name", ["llama_gqa", "gemma3", "mistral"])
@by_name("single", "ring3", "ulysses3_ring2", "pp2", "tp3_pp2", "dp2_ring2")
def test_the_closed_form_of_a_cache_is_what_the_fullest_rank_holds(name, layout):
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3}
    config = ARCHITECTURES[name](**heads)

    def work(engine: Engine) -> int:
        cache = engine.generate(tokens(2, 270), max_new_tokens=11, **GREEDY).past_key_values
        return cache.memory_bytes()

    run, sequences = RunConfig.load({"dtype": "fp32"}, **layout), 2 // layout.get("dp_size", 1)
    want = cache_bytes(run, model_dims(config), sequences, 270 + 11)
    held = serve(build(config), work, batch_size=2, micro_batch_size=2, **layout)
    assert max(held) == pytest.approx(want, rel=0.03)


def test_nothing_of_a_generation_stays_behind():
    ids = tokens(1, 20)

    def work(engine: Engine) -> tuple[int, int, int]:
        stores, counts = [], []
        for _ in range(8):
            stores.append(weakref.ref(engine.generate(ids, max_new_tokens=4, **GREEDY).past_key_values.cache_shard))
            if len(stores) in (2, 8):
                gc.collect()
                counts.append(sum(isinstance(o, Tensor) for o in gc.get_objects()))
        return sum(cache_shard() is not None for cache_shard in stores), *counts

    ((alive, early, late),) = serve(llama(), work)
    assert alive == 0
    assert late <= early


def test_a_cache_is_refused_where_it_does_not_fit():
    ids = tokens(1, 20)

    def work(engine: Engine) -> list[str]:
        begun = engine.generate(ids, max_new_tokens=4, **GREEDY)
        cache = begun.past_key_values
        hidden = torch.ones(1, 24).long()
        hidden[0, 5] = 0
        again = engine.generate(begun.sequences, hidden, past_key_values=cache, max_new_tokens=2, **GREEDY)
        calls = [
            lambda: engine.generate(ids, past_key_values=cache),
            lambda: engine.generate(tokens(2, 40), past_key_values=cache),
            lambda: engine.generate(tokens(1, 40), past_key_values=again.past_key_values),
            lambda: cache.crop(3),
            lambda: cache.update(None, None, 0),
        ]
        return [str(outcome(call)) for call in calls]

    for short, sequences, shown, crop, update in serve(llama(), work, ring_degree=2):
        assert "past_key_values holds 25 columns already, and the batch has 20" in short
        assert "past_key_values holds 1 rows, the batch 2" in sequences
        assert "attention_mask shows columns of row 0 that were padding" in shown
        assert "read and written by the engine that made it" in crop
        assert "read and written by the engine that made it" in update


@pytest.mark.parametrize("when", ["prompt", "decoding"])
def test_the_cache_of_an_interrupted_turn_is_refused(when):
    ids = tokens(1, 40)

    def work(engine: Engine) -> tuple[Exception | None, GenerateDecoderOnlyOutput]:
        cache = engine.generate(ids[:, :20], max_new_tokens=1, **GREEDY).past_key_values

        def interrupt(module: object, args: object, out: Tensor) -> None:
            if when == "prompt" or out.shape[1] == 1:
                raise KeyboardInterrupt

        handle = engine.runner.decoder.layers[1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(ids[:, :30], past_key_values=cache, max_new_tokens=4, **GREEDY)
        handle.remove()
        error = outcome(lambda: engine.generate(ids, past_key_values=cache, max_new_tokens=4, **GREEDY))
        return error, engine.generate(ids, max_new_tokens=4, **GREEDY)

    results = serve(llama(), work, ring_degree=2)
    for error, _ in results:
        assert isinstance(error, InputError)
        assert "past_key_values is broken: the generate that last wrote to it was interrupted or failed" in str(error)
    assert_same(on_all_ranks_alike([got for _, got in results]), unsharded(llama(), ids, max_new_tokens=4))
