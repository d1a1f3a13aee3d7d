"""How users of transformers call a model: with what a tokenizer gives, by transformers' names, and with mistakes."""

from __future__ import annotations

import pytest
import torch

from ds_ring.cli.seeded_checkpoint import byte_tokenizer
from ds_ring.engine import generation_forward
from ds_ring.engine.engine import Engine
from ds_ring.errors import InputError
from tests.helpers.generation import GREEDY, assert_same, llama, on_all_ranks_alike, tokens, unsharded
from tests.helpers.mocked_world import outcome, relative_error, serve
from tests.helpers.tiny_models import build, llama_gqa

RING = {"ring_degree": 2}


@pytest.fixture(scope="module")
def model():
    return build(llama_gqa(vocab_size=300))


def test_an_engine_takes_what_a_tokenizer_gives(model):
    encoded = byte_tokenizer()(["a text of some length", "a shorter one"], padding=True, return_tensors="pt")
    with torch.no_grad():
        want = model(**encoded).logits
    got, _ = serve(model, lambda engine: engine(**encoded).logits, **RING)
    shown = encoded.attention_mask.bool()
    assert relative_error(got[shown], want[shown]) < 1e-5


def test_options_that_change_nothing_are_taken(model):
    ids = tokens(1, 21)
    zeros = torch.zeros_like(ids)

    def work(engine: Engine) -> torch.Tensor:
        generated = engine.generate(ids, token_type_ids=zeros, max_new_tokens=2, do_sample=False)
        assert generated.shape == (1, 23)
        return engine(ids, token_type_ids=zeros, use_cache=False, return_dict=True).logits

    got, _ = serve(model, work, **RING)
    with torch.no_grad():
        assert relative_error(got, model(ids).logits) < 1e-5


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"output_attentions": True}, "output_attentions"),
        ({"labels": torch.ones(1, 8)}, "labels"),
        ({"token_type_ids": torch.ones(1, 8)}, "token_type_ids"),
        ({"use_cache": True}, "use_cache"),
        ({"atention_mask": None}, "atention_mask"),
    ],
)
def test_what_the_engine_does_not_take_is_refused_by_name(model, options, name):
    for error in serve(model, lambda engine: outcome(lambda: engine(tokens(1, 8), **options)), **RING):
        assert isinstance(error, InputError)
        assert f"does not take {name};" in str(error)


def test_a_misspelt_option_of_generate_is_refused_by_name(model):
    for error in serve(model, lambda e: outcome(lambda: e.generate(tokens(1, 8), max_new_token=3)), **RING):
        assert isinstance(error, InputError)
        assert "max_new_token" in str(error)


@pytest.mark.parametrize("layout", [RING, {"pp_size": 2}], ids=str)
def test_transformers_prefill_chunk_size_is_the_size_of_a_chunk(layout, monkeypatch):
    sizes, chunks = [], generation_forward.chunks

    def spied(*args, size, **options):
        sizes.append(size)
        return chunks(*args, size=size, **options)

    monkeypatch.setattr(generation_forward, "chunks", spied)
    ids = tokens(1, 37)
    want = unsharded(llama(), ids, max_new_tokens=4)
    work = lambda engine: engine.generate(ids, max_new_tokens=4, prefill_chunk_size=8, **GREEDY)  # noqa: E731
    assert_same(on_all_ranks_alike(serve(llama(), work, prefill_chunk=16, **layout)), want)
    assert sizes == [8, 8]
