"""``generate`` over every layout, held against transformers' own on the unsharded model."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from ds_ring.engine import decode_tp
from ds_ring.errors import DsRingError
from ds_ring.planning.cards import CARDS
from tests.helpers.generation import (
    GREEDY,
    LAYOUTS,
    PROMPT,
    assert_as_alone,
    assert_same,
    llama,
    on_all_ranks_alike,
    padded,
    tokens,
    unsharded,
)
from tests.helpers.mocked_world import serve
from tests.helpers.tiny_models import ARCHITECTURES, build, gpt_neox, llama_gqa, mistral, shared


def layout_of(name: str) -> dict[str, int]:
    """Four ranks of ring x Ulysses, or six where the heads are odd."""
    return {"ring_degree": 2, "ulysses_degree": 3 if name == "llama_gqa" else 2}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sixty_four_greedy_tokens_of_every_architecture(name):
    model, ids = shared(name), tokens(1, PROMPT)
    want = unsharded(model, ids, max_new_tokens=64)
    results = serve(model, lambda engine: engine.generate(ids, max_new_tokens=64, **GREEDY), **layout_of(name))
    assert_same(on_all_ranks_alike(results), want)


@pytest.mark.parametrize("layout", [{"pp_size": 2}, {"tp_size": 2}], ids=str)
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "opt", "pythia", "qwen3"])
def test_sixty_four_greedy_tokens_of_the_baseline(name, layout):
    model, ids = shared(name), tokens(1, PROMPT)
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
    model, ids = shared(name), tokens(2, PROMPT)
    ids[1, :5] = 0
    options: dict[str, Any] = {"max_new_tokens": 40, "attention_mask": (ids > 0).long()}
    want = unsharded(model, ids, **options)

    def work(engine):
        assert engine.runner.decodes_sliced
        return engine.generate(ids, **options, **GREEDY)

    assert_same(on_all_ranks_alike(serve(model, work, decode="sliced", batch_size=2, **layout)), want)


def test_auto_slices_where_that_pays_and_can_be(monkeypatch, caplog):
    """By what a card reads and a collective takes; on CPUs a tiny model is not worth it."""

    def sliced(name: str, **options: Any) -> list[bool]:
        return serve(shared(name), lambda engine: engine.runner.decodes_sliced, ring_degree=2, **options)

    assert sliced("llama_gqa") == [False, False]
    monkeypatch.setattr(decode_tp, "card_of", lambda device: replace(CARDS["H100"], collective_s=0.0))
    assert sliced("pythia") == [True, True]
    assert sliced("pythia", decode="whole") == [False, False]
    with caplog.at_level("INFO", "ds_ring"):
        assert sliced("gpt2") == [False, False]
    assert "every rank decodes with whole weights: GPT2LMHeadModel" in caplog.text


def test_slices_pay_where_the_bytes_saved_outweigh_the_collectives():
    card = replace(CARDS["H100"], memory_bytes=1e12, collective_s=1e-5)
    assert decode_tp.pays(4_000_000_000, 32, 2, card)  # 2 ms against 0.96
    assert not decode_tp.pays(1_000_000_000, 32, 2, card)  # 0.5
    assert decode_tp.pays(1_400_000_000, 32, 4, card)  # 1.05


@pytest.mark.parametrize(
    ("name", "degree", "text"),
    [
        ("gpt2", 2, "GPT2LMHeadModel: transformers' config has no tensor-parallel plan for it"),
        ("llama_gqa", 9, "num_kv_heads=3 is not divisible by the 9 ranks that share a sequence"),
    ],
)
def test_weights_that_cannot_be_sliced_are_refused_before_work(name, degree, text):
    with pytest.raises(DsRingError, match=re.escape(text)):
        serve(shared(name), lambda engine: None, decode="sliced", ring_degree=degree)


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


@pytest.mark.parametrize(
    ("name", "prefill_chunk"),
    [*((name, 0) for name in LAYOUTS), *((name, 8) for name in ("ring3", "ulysses3_ring2", "pp2", "dp2_tp3"))],
)
def test_rows_of_unequal_length_equal_each_alone(name, prefill_chunk):
    ids, mask = padded([PROMPT, 5, 1, 20, 33])
    options = {"batch_size": 5, "micro_batch_size": 2, "prefill_chunk": prefill_chunk, **LAYOUTS[name]}
    results = serve(llama(), lambda engine: engine.generate(ids, mask, max_new_tokens=10, **GREEDY), **options)
    assert_as_alone(llama(), ids, mask, on_all_ranks_alike(results))


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss", "gpt2", "opt"])
def test_rows_of_unequal_length_in_chunks_of_other_architectures(name):
    model, (ids, mask) = shared(name), padded([PROMPT, 5, 30])
    options = {"ring_degree": 2, "micro_batch_size": 3, "prefill_chunk": 7}
    results = serve(model, lambda engine: engine.generate(ids, mask, max_new_tokens=16, **GREEDY), **options)
    assert_as_alone(model, ids, mask, on_all_ranks_alike(results))


@pytest.mark.parametrize("variant", ["auto", "pass_q", "pass_kv", "gather_kv"])
@pytest.mark.parametrize("layout", [{"ring_degree": 3}, {"ulysses_degree": 3, "ring_degree": 2}], ids=str)
def test_chunks_behind_a_cached_prefix_by_every_variant(layout, variant):
    ids = tokens(1, 101)
    want = unsharded(llama(), ids, max_new_tokens=4)
    options = {"prefill_chunk": 23, "ring_variant": variant, **layout}
    results = serve(llama(), lambda engine: engine.generate(ids, max_new_tokens=4, **GREEDY), **options)
    assert_same(on_all_ranks_alike(results), want)
