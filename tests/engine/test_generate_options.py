"""What transformers' ``generate`` offers beyond greedy tokens: streamers, processors, criteria, masks, lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList, TextStreamer

from ds_ring.cli.seeded_checkpoint import byte_tokenizer
from ds_ring.engine.engine import Engine
from ds_ring.errors import InputError
from tests.helpers.generation import (
    GREEDY,
    Heard,
    assert_as_alone,
    assert_same,
    by_name,
    llama,
    on_all_ranks_alike,
    tokens,
    unsharded,
)
from tests.helpers.mocked_world import outcome, serve
from tests.helpers.tiny_models import build, llama_gqa


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


def test_stop_strings_are_transformers_own():
    model, ids, tokenizer = build(llama_gqa(vocab_size=257)), tokens(1, 20), byte_tokenizer()
    want = unsharded(model, ids, max_new_tokens=12)
    # The eighth new token is a character by itself, and the first of its kind.
    stop = tokenizer.decode(want.sequences[0, 27:28])
    options = {"max_new_tokens": 12, "stop_strings": [stop], "tokenizer": tokenizer}
    want = unsharded(model, ids, **options)
    assert want.sequences.shape[1] == 28
    results = serve(model, lambda engine: engine.generate(ids, **GREEDY, **options), ring_degree=2)
    assert_same(on_all_ranks_alike(results), want)


def test_without_a_mask_padding_tokens_are_padding_as_in_transformers():
    ids = tokens(2, 20)
    ids[1, :7] = 0
    want = unsharded(llama(), ids, attention_mask=None, max_new_tokens=6)
    results = serve(llama(), lambda engine: engine.generate(ids, max_new_tokens=6, **GREEDY), ring_degree=2)
    got = on_all_ranks_alike(results)
    assert_same(got, want)
    assert_as_alone(llama(), ids, ids != 0, got)


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


def test_a_max_length_of_as_many_as_the_default_of_new_tokens():
    model, ids = build(llama_gqa(max_position_embeddings=24)), tokens(1, 15)
    want = unsharded(model, ids, max_length=20)
    assert want.sequences.shape == (1, 20)

    def work(engine: Engine) -> Tensor:
        return engine.generate(ids, max_length=20, **GREEDY).sequences

    for got in serve(model, work, max_length=24, ring_degree=2):
        assert torch.equal(got, want.sequences)


def test_several_sequences_of_one_prompt():
    ids = tokens(1, 20)
    want = unsharded(llama(), ids, max_new_tokens=5).sequences

    def work(engine: Engine) -> Tensor:
        # At this temperature sampling is greedy.
        options = {"do_sample": True, "temperature": 1e-6, "num_return_sequences": 2, "max_new_tokens": 5}
        return engine.generate(ids, eos_token_id=None, pad_token_id=0, **options)

    for got in serve(llama(), work, dp_size=2, batch_size=2):
        assert torch.equal(got, want.expand(2, -1))
