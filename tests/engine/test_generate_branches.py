"""A cache that is kept, copied and cropped: each branch gives what it gives without a cache."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from ds_ring.engine.engine import Engine
from ds_ring.errors import InputError
from ds_ring.hf.cache import ShardedCache
from tests.helpers.generation import (
    GREEDY,
    assert_as_alone,
    by_name,
    llama,
    on_all_ranks_alike,
    padded,
    tokens,
    unsharded,
)
from tests.helpers.mocked_world import outcome, serve
from tests.helpers.rope_models import SWITCH, rope_model
from tests.helpers.tiny_models import shared

LENGTHS = [30, 9]
"""Of two rows of a prefix; windows of these models are of 24 tokens."""
COLUMNS = max(LENGTHS)
QUESTIONS = [tokens(2, n, seed=n) for n in (7, 1, 11)]


def asked(engine: Engine, ids: Tensor, mask: Tensor, cache: ShardedCache | None) -> GenerateDecoderOnlyOutput:
    return engine.generate(ids, mask, past_key_values=cache, max_new_tokens=5, **GREEDY)


def behind(ids: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    """A conversation that begins with the rows of ``LENGTHS``, with ``more`` at its end; its mask."""
    whole = torch.cat((ids, more), 1)
    mask = torch.ones_like(whole)
    mask[1, : COLUMNS - LENGTHS[1]] = 0
    return whole, mask


def prefix_cache(engine: Engine) -> ShardedCache:
    """Of the prefix alone, as the single new token has not run."""
    cache = engine.generate(*padded(LENGTHS), max_new_tokens=1, **GREEDY).past_key_values
    assert isinstance(cache, ShardedCache)
    assert cache.get_seq_length() == COLUMNS
    return cache


def assert_each_as_alone(name: str, results: list[list[GenerateDecoderOnlyOutput]]) -> None:
    for turn in zip(*results, strict=True):
        got = on_all_ranks_alike(list(turn))
        given = got.sequences[:, :-5]
        assert_as_alone(shared(name), given, behind(given, given[:, :0])[1], got)


@pytest.mark.parametrize("name", ["llama_gqa", "mistral"])
@by_name("single", "ring3", "ulysses3", "ulysses3_ring2", "pp2", "dp2_ring2")
def test_many_questions_about_one_prefix(name, layout):
    """Rows of unequal length, layers that have let go of the prefix's beginning, and steps of decoding."""
    ids, _ = padded(LENGTHS)

    def work(engine: Engine) -> list[GenerateDecoderOnlyOutput]:
        cache = prefix_cache(engine)
        found = [asked(engine, *behind(ids, more), copy.deepcopy(cache)) for more in QUESTIONS]
        branch = found[0]
        found += [asked(engine, *behind(branch.sequences, more), copy.copy(branch.past_key_values))
                  for more in QUESTIONS[:2]]  # fmt: skip
        # At last the prefix's own cache, which no copy has changed.
        return [*found, asked(engine, *behind(ids, QUESTIONS[2]), cache)]

    assert_each_as_alone(name, serve(shared(name), work, batch_size=2, micro_batch_size=2, **layout))


@by_name("single", "ring3", "ring2_contiguous_pass_kv", "ulysses3_ring2", "pp2", "dp2_ring2")
def test_a_cache_is_cropped_to_where_a_turn_began_and_its_memory_is_free_again(layout):
    ids, _ = padded(LENGTHS)

    def work(engine: Engine) -> tuple[list[GenerateDecoderOnlyOutput], list[list[int]]]:
        cache, found, used = prefix_cache(engine), [], []
        for more in QUESTIONS:
            used.append(list(cache.cache_shard.used))
            found.append(asked(engine, *behind(ids, more), cache))
            cache.crop(COLUMNS)
            assert torch.equal(cache.ids_BC, ids)
        # Among steps of decoding, as with transformers' negative numbers.
        cache = found[0].past_key_values
        more = torch.cat((QUESTIONS[0], found[0].sequences[:, -5:-2], QUESTIONS[1]), 1)
        found.append(asked(engine, *behind(ids, more[:, :-1]), cache))
        cache.crop(-4)
        found.append(asked(engine, *behind(ids, more), cache))
        return found, used

    results = serve(llama(), work, batch_size=2, micro_batch_size=2, **layout)
    assert_each_as_alone("llama_gqa", [found for found, _ in results])
    for _, used in results:
        assert used[0] == used[1] == used[2]


@by_name("single", "ring3", "ulysses3_ring2", "pp2", "dp2_ring2")
@pytest.mark.parametrize("left", [29, 22])
def test_a_cache_is_cropped_inside_a_prompt(layout, left):
    """Where ranks hold tokens in any order."""
    ids, _ = padded(LENGTHS)

    def work(engine: Engine) -> list[GenerateDecoderOnlyOutput]:
        cache = asked(engine, *behind(ids, QUESTIONS[0]), None).past_key_values
        cache.crop(left)
        found = [asked(engine, *behind(ids[:, :left], more), copy.deepcopy(cache)) for more in QUESTIONS]
        cache.crop(left)  # nothing is behind it
        return [*found, asked(engine, *behind(ids[:, :left], QUESTIONS[1]), cache)]

    assert_each_as_alone("llama_gqa", serve(llama(), work, batch_size=2, micro_batch_size=2, **layout))


@by_name("single", "ring3", "pp2")
def test_a_window_that_has_let_go_of_nothing_is_cropped_and_any_other_is_refused(layout):
    short, long = tokens(1, 14), tokens(1, 40)

    def work(engine: Engine) -> tuple[list[GenerateDecoderOnlyOutput], str]:
        cache = engine.generate(short, max_new_tokens=6, **GREEDY).past_key_values
        found = []
        for left, seed in ((17, 1), (10, 2), (14, 3)):
            cache.crop(left)
            ids = torch.cat((cache.ids_BC, tokens(1, 24 - left, seed)), 1)
            found.append(engine.generate(ids, past_key_values=cache, max_new_tokens=1, **GREEDY))
        # Behind the window, by a row that lets go of what it began with.
        ids = torch.cat((cache.ids_BC, tokens(1, 30, 4)), 1)
        found.append(engine.generate(ids, past_key_values=cache, max_new_tokens=5, **GREEDY))
        gone = engine.generate(long, max_new_tokens=1, **GREEDY).past_key_values
        return found, str(outcome(lambda: gone.crop(-1)))

    results = serve(shared("mistral"), work, **layout)
    for turn in zip(*(found for found, _ in results), strict=True):
        got = on_all_ranks_alike(list(turn))
        given = got.sequences[:, : -len(got.logits)]
        assert_as_alone(shared("mistral"), given, torch.ones_like(given), got)
    for _, refused in results:
        assert refused == (
            "a cache of 40 columns cannot be cropped: layers with a sliding window of 24 have let go of tokens that "
            "would be seen again; keep a copy from before (copy.deepcopy)"
        )


@by_name("single", "ring3", "pp2", "tp3_pp2")
def test_rows_are_repeated_selected_and_reordered(layout):
    """One prefix for several questions at once, and questions that are done leave."""
    prefix, questions = tokens(1, 30), tokens(3, 6, seed=5)

    def work(engine: Engine) -> list[GenerateDecoderOnlyOutput]:
        cache = engine.generate(prefix, max_new_tokens=1, **GREEDY).past_key_values
        cache.batch_repeat_interleave(3)
        whole = torch.cat((prefix.expand(3, -1), questions), 1)
        every = engine.generate(whole, past_key_values=cache, max_new_tokens=4, **GREEDY)
        two = copy.deepcopy(cache)
        two.batch_select_indices(torch.tensor([False, True, True]))
        two.batch_select_indices(torch.tensor([0, -1]))
        two.reorder_cache(torch.tensor([1, 0]))
        more = torch.cat((every.sequences[[2, 1]], tokens(2, 5, seed=6)), 1)
        return [every, engine.generate(more, past_key_values=two, max_new_tokens=4, **GREEDY)]

    for turn in zip(*serve(llama(), work, batch_size=3, micro_batch_size=2, **layout), strict=True):
        got = on_all_ranks_alike(list(turn))
        given = got.sequences[:, :-4]
        assert_as_alone(llama(), given, torch.ones_like(given), got)


def test_a_repeated_prefix_serves_several_sequences_of_one_prompt():
    prefix, whole = tokens(1, 30), torch.cat((tokens(1, 30), tokens(1, 6, seed=5)), 1)
    options = {"do_sample": True, "temperature": 1e-6, "num_return_sequences": 3, "max_new_tokens": 4}

    def work(engine: Engine) -> tuple[str, Tensor, Tensor]:
        cache = engine.generate(prefix, max_new_tokens=1, **GREEDY).past_key_values
        sampled = {"eos_token_id": None, "pad_token_id": 0, **options}
        refused = str(outcome(lambda: engine.generate(whole, past_key_values=cache, **sampled)))
        cache.batch_repeat_interleave(3)
        with_cache = engine.generate(whole, past_key_values=cache, **sampled)
        return refused, with_cache, engine.generate(whole, **sampled)

    ((refused, with_cache, without),) = serve(llama(), work)
    assert refused == "past_key_values holds 1 rows, the batch 3"
    assert torch.equal(with_cache, without)


@by_name("single", "ring3", "dp2_ring2")
def test_an_edited_conversation_is_refused_with_the_first_column_that_differs(layout):
    ids, _ = padded(LENGTHS)
    edited = ids.clone()
    edited[0, 12], edited[1, 25], edited[0, 28] = (edited[0, 12] + 1) % 90 + 1, edited[1, 25] % 90 + 2, 3
    under_padding = ids.clone()
    under_padding[1, 3] = 5

    def work(engine: Engine) -> tuple[str, str, GenerateDecoderOnlyOutput]:
        cache = prefix_cache(engine)
        refused = [str(outcome(lambda: asked(engine, *behind(edited, QUESTIONS[0]), cache)))]
        whole, mask = behind(edited, QUESTIONS[0])
        mask[0, 12] = 0  # a token that is hidden now may be anything
        refused.append(str(outcome(lambda: asked(engine, whole, mask, copy.deepcopy(cache)))))
        return *refused, asked(engine, *behind(under_padding, QUESTIONS[0]), cache)

    results = serve(llama(), work, batch_size=2, micro_batch_size=2, **layout)
    for first, second, _ in results:
        assert first == (
            f"past_key_values is of another text: in column 12 of row 0 it holds token {ids[0, 12]}, and input_ids "
            f"{edited[0, 12]}; give the conversation as it was, crop the cache to 12 columns, or begin without it"
        )
        assert f"in column 25 of row 1 it holds token {ids[1, 25]}, and input_ids {edited[1, 25]};" in second
    assert_each_as_alone("llama_gqa", [[got] for *_, got in results])


def test_what_cannot_be_cropped_or_selected_is_refused():
    def work(engine: Engine) -> list[str]:
        cache = prefix_cache(engine)
        broken = copy.deepcopy(cache)
        broken.whole = False
        calls = [
            lambda: cache.crop(-30),
            lambda: cache.crop(21),
            lambda: cache.batch_select_indices(torch.tensor([2])),
            lambda: cache.batch_select_indices(torch.tensor([], dtype=torch.long)),
            lambda: broken.crop(-1),
            lambda: cache.reset(),
        ]
        cache.crop(0)
        cache.crop(31)
        assert cache.get_seq_length() == COLUMNS
        return [str(outcome(call)) for call in calls]

    for empty, row, beyond, none, broken, reset in serve(llama(), work, ring_degree=2):
        assert empty == "crop(-30) leaves no token of row 0; begin without a cache"
        assert row == "crop(21) leaves no token of row 1; begin without a cache"
        assert beyond == "there is no row 2 in a cache of 2 rows"
        assert none == "a cache of 2 rows cannot become one of none"
        assert broken.startswith("past_key_values is broken")
        assert "update and reset are not supported" in reset


def test_arguments_of_a_cache_that_are_none_are_refused_in_one_line():
    calls: dict[str, Callable[[ShardedCache], object]] = {
        "crop's max_length=2.5 must be a whole number": lambda cache: cache.crop(2.5),
        "crop's max_length='x' must be a whole number": lambda cache: cache.crop("x"),
        "crop's max_length=None must be a whole number": lambda cache: cache.crop(None),
        "crop's max_length=True must be a whole number": lambda cache: cache.crop(True),
        "repeats=0 must be a whole number of at least 1": lambda cache: cache.batch_repeat_interleave(0),
        "repeats='x' must be a whole number of at least 1": lambda cache: cache.batch_repeat_interleave("x"),
        "rows of a cache are selected by a tensor [rows] of their numbers, not by a list": lambda cache: (
            cache.batch_select_indices([0])
        ),
        "rows of a cache are selected by a tensor [rows] of their numbers, not by a Tensor (1,) torch.float32": (
            lambda cache: cache.reorder_cache(torch.ones(1))
        ),
        "a ShardedCache cannot be pickled or saved: it is one rank's part, and belongs to its engine; keep the token "
        "ids and generate from them, or take copy.deepcopy for a branch in this process": pickle.dumps,
    }

    def work(engine: Engine) -> list[Exception | None]:
        cache = prefix_cache(engine)
        errors = [outcome(lambda call=call: call(cache)) for call in calls.values()]
        assert cache.get_seq_length() == COLUMNS
        cache.crop(torch.tensor(25))
        assert cache.get_seq_length() == 25
        return errors

    for errors in serve(llama(), work, ring_degree=2):
        assert [str(error) for error in errors] == list(calls)
        assert {type(error) for error in errors} == {InputError}


def test_rows_that_replicas_share_are_not_selected():
    def work(engine: Engine) -> str:
        return str(outcome(lambda: prefix_cache(engine).batch_repeat_interleave(2)))

    for refused in serve(llama(), work, dp_size=2, batch_size=2):
        assert refused.startswith("rows of a cache whose 2 rows are shared among replicas cannot be selected")


@pytest.mark.parametrize("layout", [{}, {"ring_degree": 2}], ids=str)
def test_a_crop_over_a_change_of_rotary_frequencies_is_refused_inside_a_call_only(layout):
    """A turn before the change leaves keys of its own, and one that goes over it fills the cache anew."""
    model, text = rope_model("llama_longrope"), tokens(1, SWITCH + 8)

    def work(engine: Engine) -> tuple[str, GenerateDecoderOnlyOutput]:
        cache = engine.generate(text, max_new_tokens=1, **GREEDY).past_key_values
        refused = str(outcome(lambda: cache.crop(SWITCH - 2)))
        cache.crop(SWITCH + 2)  # the same frequencies
        more = torch.cat((text[:, : SWITCH + 2], tokens(1, 5, seed=1)), 1)
        return refused, engine.generate(more, past_key_values=cache, max_new_tokens=3, **GREEDY)

    want = unsharded(model, torch.cat((text[:, : SWITCH + 2], tokens(1, 5, seed=1)), 1), max_new_tokens=3)
    for refused, got in serve(model, work, max_length=64, **layout):
        assert refused == (
            "crop(30) would leave keys with the rotary frequencies of a longer text; crop to where a call of generate "
            "began, or keep a copy from before (copy.deepcopy)"
        )
        assert torch.equal(got.sequences, want.sequences)


def test_a_cache_says_what_it_holds():
    def work(engine: Engine) -> list[str]:
        cache = prefix_cache(engine)
        told = [repr(cache)]
        cache.whole = False
        return [*told, repr(cache)]

    assert serve(llama(), work, micro_batch_size=2)[0] == [
        "ShardedCache(30 columns of 2 rows with 30, 9 tokens; [30] slots on the ranks of a replica)",
        "ShardedCache(30 columns of 2 rows with 30, 9 tokens; [30] slots on the ranks of a replica; broken: the "
        "generate that wrote to it was interrupted)",
    ]


def test_a_copy_has_memory_of_its_own():
    def work(engine: Engine) -> tuple[int, int]:
        cache = prefix_cache(engine)
        twin = copy.deepcopy(cache)
        held = {t.data_ptr() for pair in cache.cache_shard._layers for t in pair}
        return len(held & {t.data_ptr() for pair in twin.cache_shard._layers for t in pair}), len(held)

    for common, held in serve(llama(), work, ring_degree=2):
        assert (common, held) == (0, 6)
