"""How users of transformers call a model: with what a tokenizer gives, by transformers' names, and with mistakes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from ds_ring.cli.seeded_checkpoint import byte_tokenizer
from ds_ring.engine import cache_fit, generation_forward
from ds_ring.engine.engine import Engine
from ds_ring.errors import DisagreementError, InputError
from ds_ring.planning.cards import CARDS
from tests.helpers.generation import GREEDY, assert_same, llama, on_all_ranks_alike, tokens, unsharded
from tests.helpers.mocked_world import outcome, relative_error, serve
from tests.helpers.tiny_models import build, llama_gqa, logits

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


NO_IDS = "input_ids must be a tensor [batch, length], not "
WRONG: dict[str, tuple[Callable[[Engine], object], str]] = {
    "list": (lambda e: e.generate([[1, 2]]), f"{NO_IDS}a list; torch.tensor makes one of a list of rows"),
    "nothing": (lambda e: e.generate(None), f"{NO_IDS}None"),
    "a tokenizer's": (
        lambda e: e(byte_tokenizer()("x", return_tensors="pt")),
        f"{NO_IDS}a BatchEncoding; call with **, as in model(**tokenizer(text, return_tensors='pt'))",
    ),
    "call": (lambda e: e([[1, 2]]), f"{NO_IDS}a list"),
    "scores": (lambda e: e.score([[1, 2]]), f"{NO_IDS}a list"),
    "next": (lambda e: e.next_token_logits("text"), f"{NO_IDS}a str"),
    "a mask as ids": (lambda e: e(torch.ones(1, 4).bool()), "input_ids must be whole numbers of shape [batch, length]"),
    "mask": (lambda e: e(tokens(1, 4), [[1] * 4]), "attention_mask must be a tensor [batch, length], not a list"),
    "mask of generate": (lambda e: e.generate(tokens(1, 4), 5), "attention_mask must be a tensor [batch, length]"),
    "positions": (lambda e: e(tokens(1, 4), position_ids=torch.ones(1, 4)), "position_ids must be whole numbers, not"),
    "negative": (lambda e: e(tokens(1, 4), logits_to_keep=-1), "logits_to_keep=-1 must be a whole number of at least"),
    "half": (lambda e: e(tokens(1, 4), logits_to_keep=1.5), "logits_to_keep=1.5 must be a whole number of at least 0"),
    "twice": (lambda e: e.generate(tokens(1, 4), inputs=tokens(1, 4)), "generate was given input_ids and inputs, whi"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "words"), WRONG.values(), ids=WRONG.keys())
def test_what_is_no_tensor_and_no_number_is_refused_in_one_line(model, call, words):
    for error in serve(model, lambda engine: outcome(lambda: call(engine)), **RING):
        assert isinstance(error, InputError)
        assert str(error).startswith(words)
        assert "\n" not in str(error)


def test_how_many_logits_are_kept_must_be_the_same_on_all_ranks(model):
    for error in serve(model, lambda e: outcome(lambda: e(tokens(1, 8), logits_to_keep=e.mesh.rank)), **RING):
        assert isinstance(error, DisagreementError)
        assert "ranks disagree on logits_to_keep: rank 0 has 0, rank 1 has 1" in str(error)


def test_transformers_other_name_for_ids_and_bytes_as_ids():
    ids = tokens(1, 20)
    want = unsharded(llama(), ids, max_new_tokens=3).sequences

    def work(engine: Engine) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        kept = engine(ids.to(torch.uint8), logits_to_keep=2).logits
        named = engine.generate(inputs=ids, max_new_tokens=3, **GREEDY).sequences
        return kept, named, engine.generate(ids.to(torch.uint8), max_new_tokens=3, **GREEDY).sequences

    for kept, named, short in serve(llama(), work, **RING):
        assert relative_error(kept, logits(llama(), ids)[:, -2:]) < 1e-5
        assert torch.equal(named, want)
        assert torch.equal(short, want)


def test_a_cache_that_no_memory_holds_is_refused_with_the_sum_before_any_work(monkeypatch):
    monkeypatch.setattr(cache_fit, "card_of", lambda device: replace(CARDS["CPU"], memory_gib=3 / 1024))
    weights = sum(p.nbytes for p in llama().parameters()) / 2**10
    row_bytes = 3 * 2 * 3 * 8 * 4 + 4  # layers, keys and values, heads, head_dim, fp32; its position

    def work(engine: Engine) -> tuple[Exception | None, Exception | None, int, int]:
        ran: list[object] = []
        engine.runner.decoder.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
        huge = outcome(lambda: engine.generate(tokens(1, 20), max_new_tokens=10**12))
        rows = outcome(lambda: engine.generate(tokens(4, 20), max_new_tokens=2980))
        refused = len(ran)
        engine.generate(tokens(1, 20), max_new_tokens=3, **GREEDY)
        return huge, rows, refused, len(ran)

    for huge, rows, refused, served in serve(llama(), work, ring_degree=2):
        assert (refused, served) == (0, 3)
        assert {type(huge), type(rows)} == {InputError}
        assert str(huge).startswith(
            "20 tokens of input + max_new_tokens=1000000000000 = 1000000000020 in 1 row(s) take "
            f"{500000000011 * row_bytes / 2**30:,.1f} GiB of cache on a rank"
        )
        assert str(rows) == (
            f"20 tokens of input + max_new_tokens=2980 = 3000 in 4 row(s) take {4 * 1501 * row_bytes / 2**20:.1f} MiB "
            f"of cache on a rank beside {weights:.1f} KiB of weights, and it has 3.0 MiB; lower max_new_tokens, give "
            f"fewer or shorter rows, or share them among more ranks"
        )
