"""``generate`` over every layout, held against transformers' own on the unsharded model."""

from __future__ import annotations

import gc
import re
import weakref
from functools import cache
from typing import Any

import pytest
import torch
from mocked_world import outcome, relative_error, serve
from tiny_models import ARCHITECTURES, build, gpt_neox, llama_gqa, mistral
from tiny_models import tokens as any_tokens
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StoppingCriteriaList, TextStreamer
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

from ds_ring.engines.base import Engine
from ds_ring.errors import DsRingError, InputError, NumericsError, TransportError
from ds_ring.hf.anatomy import Anatomy
from ds_ring.hf.cache import ShardedCache

PROMPT = 37
TOLERANCE = 1e-5
"""On the relative error of a step's logits, fp32."""
SAFE_MARGIN = 2e-4
"""Least distance of the best two logits at which a greedy token counts: ten times what rounding moves a logit of these
models (2e-5 at most), so that no token is a toss-up. Every reference here is asserted to keep it."""

GREEDY: dict[str, Any] = {
    "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True,
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {},
    "ring3": {"ring_degree": 3},
    "ring2_contiguous_pass_kv": {"ring_degree": 2, "ring_impl": "contiguous", "ring_variant": "pass_kv"},
    "ulysses3": {"ulysses_degree": 3},
    "ulysses3_ring2": {"ulysses_degree": 3, "ring_degree": 2},
    "pp2": {"pp_size": 2},
    "tp3_pp2": {"tp_size": 3, "pp_size": 2},
    "dp2_ring2": {"dp_size": 2, "ring_degree": 2},
    "dp2_tp3": {"dp_size": 2, "tp_size": 3},
}


def by_name(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("layout", [LAYOUTS[name] for name in names], ids=names)


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """Without token 0, which pads: transformers would leave it out where no mask is given."""
    return any_tokens(rows, length, seed).clamp(min=1)


@cache
def llama() -> PreTrainedModel:
    """Nine query heads over three key/value heads."""
    return build(llama_gqa())


def unsharded(model: PreTrainedModel, ids: Tensor, **options: Any) -> GenerateDecoderOnlyOutput:
    with torch.no_grad():
        found = model.generate(ids, **GREEDY | {"attention_mask": torch.ones_like(ids)} | options)
    best_two = torch.stack(found.logits).topk(2).values
    assert (best_two[..., 0] - best_two[..., 1]).min() > SAFE_MARGIN
    return found


def assert_same(got: GenerateDecoderOnlyOutput, want: GenerateDecoderOnlyOutput) -> None:
    assert torch.equal(got.sequences, want.sequences)
    for step, (own, other) in enumerate(zip(got.logits, want.logits, strict=True)):
        assert relative_error(own, other) < TOLERANCE, step


def on_all_ranks_alike(results: list[GenerateDecoderOnlyOutput]) -> GenerateDecoderOnlyOutput:
    for other in results[1:]:
        assert torch.equal(other.sequences, results[0].sequences)
        assert all(torch.equal(a, b) for a, b in zip(other.logits, results[0].logits, strict=True))
    return results[0]


def layout_of(name: str) -> dict[str, int]:
    """Four ranks of ring x Ulysses, or six where the heads are odd."""
    return {"ring_degree": 2, "ulysses_degree": 3 if name == "llama_gqa" else 2}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sixty_four_greedy_tokens_of_every_architecture(name):
    model, ids = build(ARCHITECTURES[name]()), tokens(1, PROMPT)
    want = unsharded(model, ids, max_new_tokens=64)
    results = serve(model, lambda engine: engine.generate(ids, max_new_tokens=64, **GREEDY), **layout_of(name))
    assert_same(on_all_ranks_alike(results), want)


@pytest.mark.parametrize("layout", [{"pp_size": 2}, {"tp_size": 2}], ids=str)
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "opt", "pythia", "qwen3"])
def test_sixty_four_greedy_tokens_of_the_baseline(name, layout):
    model, ids = build(ARCHITECTURES[name]()), tokens(1, PROMPT)
    want = unsharded(model, ids, max_new_tokens=64)
    results = serve(model, lambda engine: engine.generate(ids, max_new_tokens=64, **GREEDY), **layout)
    assert_same(on_all_ranks_alike(results), want)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama_gqa", {"ring_degree": 3}), ("llama_gqa", {"ulysses_degree": 3, "ring_degree": 1}),
        ("qwen3", {"ring_degree": 2}), ("gemma2", {"ulysses_degree": 2}), ("mistral", {"ring_degree": 2}),
        ("gpt_neox", {"ring_degree": 2, "ulysses_degree": 3}), ("gpt_neox", {"dp_size": 2, "ring_degree": 2}),
    ],
)  # fmt: skip
def test_decoding_with_slices_of_the_weights(name, layout):
    """Two rows of unequal length, one left-padded; each rank computes its heads, and attends for all of them."""
    model, ids = build(ARCHITECTURES[name]()), tokens(2, PROMPT)
    ids[1, :5] = 0
    options: dict[str, Any] = {"max_new_tokens": 40, "attention_mask": (ids > 0).long()}
    want = unsharded(model, ids, **options)

    def work(engine):
        assert engine.decodes_sliced
        return engine.generate(ids, **options, **GREEDY)

    assert_same(on_all_ranks_alike(serve(model, work, decode="sliced", batch_size=2, **layout)), want)


@pytest.mark.parametrize(
    ("name", "degree", "text"),
    [
        ("gpt2", 2, "GPT2LMHeadModel: transformers' config has no tensor-parallel plan for it"),
        ("llama_gqa", 9, "num_kv_heads=3 is not divisible by the 9 ranks that share a sequence"),
    ],
)
def test_weights_that_cannot_be_sliced_are_refused_before_work(name, degree, text):
    with pytest.raises(DsRingError, match=re.escape(text)):
        serve(build(ARCHITECTURES[name]()), lambda engine: None, decode="sliced", ring_degree=degree)


def test_two_hundred_and_fifty_six_tokens_through_a_window_of_twenty_four():
    model, ids = build(mistral()), tokens(1, PROMPT)
    want = unsharded(model, ids, max_new_tokens=256)
    results = serve(model, lambda engine: engine.generate(ids, max_new_tokens=256, **GREEDY), ring_degree=3)
    assert_same(on_all_ranks_alike(results), want)


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (lambda: gpt_neox(), {"ulysses_degree": 4, "ring_degree": 4}),
        (lambda: gpt_neox(), {"tp_size": 8, "pp_size": 2}),
        (lambda: llama_gqa(), {"ulysses_degree": 3, "ring_degree": 3}),
    ],
    ids=["ulysses4_ring4", "tp8_pp2", "nine_heads_on_ulysses3_ring3"],
)
def test_many_ranks(config, layout):
    model, ids = build(config()), tokens(1, PROMPT)
    want = unsharded(model, ids, max_new_tokens=24)
    results = serve(model, lambda engine: engine.generate(ids, max_new_tokens=24, **GREEDY), **layout)
    assert_same(on_all_ranks_alike(results), want)


def padded(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Left-padded ids and mask; under padding stand tokens that must not count."""
    ids, mask = tokens(len(lengths), max(lengths)), torch.ones(len(lengths), max(lengths), dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, : max(lengths) - n] = 0
    return ids, mask


def assert_rows_as_alone(model: PreTrainedModel, ids: Tensor, mask: Tensor, got: GenerateDecoderOnlyOutput) -> None:
    new = len(got.logits)
    for row in range(len(ids)):
        alone = unsharded(model, ids[row : row + 1, mask[row].bool()], max_new_tokens=new)
        assert torch.equal(got.sequences[row, -new:], alone.sequences[0, -new:])
        for own, other in zip(got.logits, alone.logits, strict=True):
            assert relative_error(own[row], other[0]) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "prefill_chunk"),
    [*((name, 0) for name in LAYOUTS), *((name, 8) for name in ("ring3", "ulysses3_ring2", "pp2", "dp2_tp3"))],
)
def test_rows_of_unequal_length_equal_each_alone(name, prefill_chunk):
    ids, mask = padded([PROMPT, 5, 1, 20, 33])
    options = {"batch_size": 5, "micro_batch_size": 2, "prefill_chunk": prefill_chunk, **LAYOUTS[name]}
    results = serve(llama(), lambda engine: engine.generate(ids, mask, max_new_tokens=10, **GREEDY), **options)
    assert_rows_as_alone(llama(), ids, mask, on_all_ranks_alike(results))


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss", "gpt2", "opt"])
def test_rows_of_unequal_length_in_chunks_of_other_architectures(name):
    model, (ids, mask) = build(ARCHITECTURES[name]()), padded([PROMPT, 5, 30])
    options = {"ring_degree": 2, "micro_batch_size": 3, "prefill_chunk": 7}
    results = serve(model, lambda engine: engine.generate(ids, mask, max_new_tokens=16, **GREEDY), **options)
    assert_rows_as_alone(model, ids, mask, on_all_ranks_alike(results))


@pytest.mark.parametrize("variant", ["auto", "pass_q", "pass_kv", "gather_kv"])
@pytest.mark.parametrize("layout", [{"ring_degree": 3}, {"ulysses_degree": 3, "ring_degree": 2}], ids=str)
def test_chunks_behind_a_cached_prefix_by_every_variant(layout, variant):
    ids = tokens(1, 101)
    want = unsharded(llama(), ids, max_new_tokens=4)
    options = {"prefill_chunk": 23, "ring_variant": variant, **layout}
    results = serve(llama(), lambda engine: engine.generate(ids, max_new_tokens=4, **GREEDY), **options)
    assert_same(on_all_ranks_alike(results), want)


@pytest.mark.parametrize("name", ["llama_gqa", "mistral", "gpt_oss"])
@by_name("single", "ring3", "pp2", "dp2_ring2")
def test_a_conversation_goes_on_from_its_cache(name, layout):
    model, (first, mask) = build(ARCHITECTURES[name]()), padded([PROMPT, 9])
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
        assert_rows_as_alone(model, ids, seen, got)


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
    assert_rows_as_alone(llama(), got.sequences[:, :-6], mask, got)


@pytest.mark.parametrize("prompt", [1, 37])
@by_name("ring3", "ulysses3_ring2")
def test_every_rank_holds_its_share_of_the_cache(layout, prompt):
    ranks = layout.get("ring_degree", 1) * layout.get("ulysses_degree", 1)

    def work(engine: Engine) -> tuple[list[int], int]:
        cache = engine.generate(tokens(2, prompt), max_new_tokens=40, **GREEDY).past_key_values
        assert isinstance(cache, ShardedCache)
        assert cache.get_seq_length() == prompt + 39
        return cache.store.used, cache.memory_bytes()

    per_slot = 2 * 3 * (2 * 3 * 8 * 4) + 2 * 4  # rows x layers x (k, v: heads x head_dim x fp32), and positions
    for used, memory in serve(llama(), work, micro_batch_size=2, **layout):
        # Prompts are padded to a multiple of what the layout cuts.
        assert prompt + 39 <= sum(used) <= prompt + 39 + 2 * ranks + 2
        assert max(used) - min(used) <= 1
        assert max(used) * per_slot <= memory <= max(64, 1.5 * max(used)) * per_slot


def test_nothing_of_a_generation_stays_behind():
    ids = tokens(1, 20)

    def work(engine: Engine) -> tuple[int, int, int]:
        stores, counts = [], []
        for _ in range(8):
            stores.append(weakref.ref(engine.generate(ids, max_new_tokens=4, **GREEDY).past_key_values.store))
            if len(stores) in (2, 8):
                gc.collect()
                counts.append(sum(isinstance(o, Tensor) for o in gc.get_objects()))
        return sum(store() is not None for store in stores), *counts

    ((alive, early, late),) = serve(llama(), work)
    assert alive == 0
    assert late <= early


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@by_name("ring3", "tp3_pp2")
def test_only_rank_0_streams(layout):
    ids = tokens(1, 20)

    def work(engine: Engine) -> tuple[Heard, Tensor]:
        heard = Heard()
        return heard, engine.generate(ids, max_new_tokens=5, streamer=heard, **GREEDY).sequences

    first, *others = serve(llama(), work, **layout)
    assert first[0].ended
    assert first[0].tokens == first[1][0].tolist()
    assert not any(heard.tokens or heard.ended for heard, _ in others)


def test_a_text_streamer_takes_one_row():
    def work(engine: Engine) -> Exception | None:
        return outcome(lambda: engine.generate(tokens(2, 20), streamer=TextStreamer(None)))

    for error in serve(llama(), work, ring_degree=2):
        assert isinstance(error, InputError)
        assert "TextStreamer takes one row, the batch has 2" in str(error)


def test_processors_and_stopping_criteria_are_transformers_own():
    ids = tokens(1, 20)
    options = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3, "max_new_tokens": 12}

    def stop_at_25(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 25)

    want = unsharded(llama(), ids, **options)
    results = serve(llama(), lambda engine: engine.generate(ids, **GREEDY, **options), ring_degree=2)
    assert_same(on_all_ranks_alike(results), want)

    def stopped(engine: Engine) -> Tensor:
        # Were each rank's own word taken, those behind rank 0 would stop at once.
        mine = stop_at_25 if engine.mesh.rank == 0 else lambda ids, scores, **kwargs: torch.ones(len(ids)).bool()
        criteria = StoppingCriteriaList([mine])
        return engine.generate(ids, stopping_criteria=criteria, **GREEDY, **options).sequences

    for got in serve(llama(), stopped, ring_degree=3):
        assert torch.equal(got, want.sequences[:, :25])


def test_without_a_mask_padding_tokens_are_padding_as_in_transformers():
    ids = tokens(2, 20)
    ids[1, :7] = 0
    want = unsharded(llama(), ids, attention_mask=None, max_new_tokens=6)
    results = serve(llama(), lambda engine: engine.generate(ids, max_new_tokens=6, **GREEDY), ring_degree=2)
    got = on_all_ranks_alike(results)
    assert_same(got, want)
    assert_rows_as_alone(llama(), ids, ids != 0, got)


def test_a_generation_config_and_the_default_length():
    ids = tokens(1, 20)
    want = unsharded(llama(), ids)
    assert want.sequences.shape == (1, 40)

    def work(engine: Engine) -> tuple[Tensor, Tensor]:
        config = engine.model.generation_config
        config.update(do_sample=False, pad_token_id=0, eos_token_id=None)
        return engine.generate(ids), engine.generate(ids, generation_config=config, max_length=25)

    for default, short in serve(llama(), work, ring_degree=2):
        assert torch.equal(default, want.sequences)
        assert torch.equal(short, want.sequences[:, :25])


def test_several_sequences_of_one_prompt():
    ids = tokens(1, 20)
    want = unsharded(llama(), ids, max_new_tokens=5).sequences

    def work(engine: Engine) -> Tensor:
        # At this temperature sampling is greedy.
        options = {"do_sample": True, "temperature": 1e-6, "num_return_sequences": 2, "max_new_tokens": 5}
        return engine.generate(ids, eos_token_id=None, pad_token_id=0, **options)

    for got in serve(llama(), work, dp_size=2, batch_size=2):
        assert torch.equal(got, want.expand(2, -1))


LIMITED = {"max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("ids", "mask", "options", "words"),
    [
        (torch.ones(1, 0).long(), None, {}, "at least one of each, not (1, 0)"),
        (torch.ones(1, 40).long(), None, {"max_new_tokens": 25}, "40 tokens of input + max_new_tokens=25 exceed the "
         "model's max_position_embeddings=64"),
        (torch.ones(1, 40).long(), None, {"max_length": 40}, "nothing to generate"),
        (torch.ones(1, 40).long(), None, {"max_new_tokens": 0}, "`max_new_tokens` must be greater than 0"),
        (torch.ones(1, 4).long(), torch.tensor([[1, 1, 1, 0]]), {}, "row 0 of the batch ends in padding"),
        (torch.ones(1, 4).long(), torch.ones(1, 5).long(), {}, "attention_mask has 5 columns, input_ids 4"),
        (torch.ones(1, 4).long() * 97, None, {}, "token id 97 is outside the vocabulary of 97"),
        (torch.ones(1, 4).long(), None, {"num_beams": 2}, "does not serve beam_search (num_beams=2)"),
        (torch.ones(1, 4).long(), None, {"prompt_lookup_num_tokens": 2}, "does not serve prompt_lookup_num_tokens"),
        (torch.ones(1, 4).long(), None, {"assistant_model": "any"}, "does not serve assistant_model"),
        (torch.ones(1, 4).long(), None, {"use_cache": False}, "use_cache=False"),
        (torch.ones(1, 4).long(), None, {"prefill_chunk_size": 2}, '"prefill_chunk": 2'),
        (torch.ones(1, 4).long(), None, {"past_key_values": DynamicCache()}, "a DynamicCache that another model made"),
    ],
    ids=lambda value: None if isinstance(value, Tensor) else str(value)[:20],
)  # fmt: skip
@pytest.mark.parametrize("layout", [{"ring_degree": 2}, {"pp_size": 2}], ids=str)
def test_what_cannot_work_is_refused_by_name_on_every_rank(layout, ids, mask, options, words):
    model = build(llama_gqa(**LIMITED))
    errors = serve(
        model, lambda engine: outcome(lambda: engine.generate(ids, mask, **options)), max_length=64, **layout
    )
    for error in errors:
        assert isinstance(error, InputError)
        assert words in str(error)


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

    for short, rows, shown, crop, update in serve(llama(), work, ring_degree=2):
        assert "past_key_values holds 25 columns already, and the batch has 20" in short
        assert "past_key_values holds 1 rows, the batch 2" in rows
        assert "attention_mask shows columns of row 0 that were padding" in shown
        assert "read and written by the engine that made it" in crop
        assert "read and written by the engine that made it" in update


def test_ranks_that_were_given_different_things_say_so():
    def work(engine: Engine) -> list[Exception | None]:
        rank = engine.mesh.rank
        return [
            outcome(lambda: engine.generate(tokens(1, 20, seed=rank), max_new_tokens=2)),
            outcome(lambda: engine.generate(tokens(1, 20), max_new_tokens=2 + rank)),
            outcome(lambda: engine.generate(tokens(1, 20), max_new_tokens=2, num_beams=1 + rank)),
        ]

    for ids, length, beams in serve(llama(), work, ring_degree=2):
        assert isinstance(ids, TransportError)
        assert "input_ids" in str(ids)
        assert "generate's max_new_tokens: rank 0 has 2, rank 1 has 3" in str(length)
        assert isinstance(beams, DsRingError)


def test_more_replicas_than_rows_are_refused():
    (error, *_) = serve(
        llama(), lambda engine: outcome(lambda: engine.generate(tokens(1, 20))), dp_size=2, batch_size=2
    )
    assert "dp_size=2" in str(error)


@pytest.mark.parametrize("when", ["prompt", "decoding"])
def test_nan_is_told(when):
    def work(engine: Engine) -> Exception | None:
        layer = Anatomy.of(engine.model).layers[1]

        def spoil(module: object, args: object, out: Any) -> Any:
            hidden = out if isinstance(out, Tensor) else out[0]
            if when == "prompt" or hidden.shape[1] == 1:
                hidden.mul_(torch.nan)

        layer.register_forward_hook(spoil)
        return outcome(lambda: engine.generate(tokens(1, 20), max_new_tokens=3, **GREEDY))

    for error in serve(llama(), work, ring_degree=2):
        assert isinstance(error, NumericsError)
        assert ("layer 1 of 3" if when == "prompt" else "generated token") in str(error)
