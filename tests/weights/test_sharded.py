"""Weights that ranks hold between them give what whole weights give, bit for bit, and take no more memory than said."""

import copy

import pytest
import torch

from ds_ring.weights.cut import bounds
from tests.helpers.mocked_world import outcome, serve
from tests.helpers.tiny_models import VOCAB, build, gemma2, gpt2, gpt_neox, gpt_oss, llama_gqa, mixtral, phi3, qwen2

MODELS = {
    "llama": lambda: llama_gqa(num_hidden_layers=5),
    "neox": gpt_neox,
    "qwen2": qwen2,
    "gemma2": gemma2,
    "phi3": phi3,
    "mixtral": mixtral,
    "gpt_oss": gpt_oss,
    "gpt2": gpt2,
}
LAYOUTS = {
    "ring2": {"ring_degree": 2},
    "hybrid": {"ring_degree": 2, "ulysses_degree": 3},
    "ring3_dp2": {"ring_degree": 3, "dp_size": 2, "batch_size": 4},
    "ring4_two_copies": {"ring_degree": 4, "weights_degree": 2},
}
PLACES = ("sharded", "streamed")


def batch_of(*lengths):
    longest = max(lengths)
    ids = torch.randint(0, VOCAB, (len(lengths), longest), generator=torch.Generator().manual_seed(1))
    return ids, torch.tensor([[int(i >= longest - n) for i in range(longest)] for n in lengths])


def results(engine, ids, mask):
    """Hidden states where they are made, logits of all and of last tokens."""
    batch, _ = engine.prepare(ids, mask, None)
    hidden = [shard.hidden_BTd for shard in engine.prefill(batch, "none", want_hidden=True)]
    return hidden, engine(ids, attention_mask=mask).logits, engine.next_token_logits(ids, attention_mask=mask)


def assert_same(got, want):
    for (hidden, logits, last), (want_hidden, want_logits, want_last) in zip(got, want, strict=True):
        assert all(torch.equal(mine, other) for mine, other in zip(hidden, want_hidden, strict=True))
        assert (logits - want_logits).abs().max() <= 1e-6 * want_logits.abs().max()
        assert (last - want_last).abs().max() <= 1e-6 * want_last.abs().max()


@pytest.mark.parametrize("wire", ["threads", "copy_engine"])
@pytest.mark.parametrize("name", MODELS)
def test_models_give_what_whole_weights_give(name, wire):
    model, (ids, mask) = build(MODELS[name]()), batch_of(63, 41, 63)
    layout = {"ring_degree": 2, "interleave": "on"}
    want = serve(model, lambda engine: results(engine, ids, mask), wire=wire, **layout)
    assert_same(serve(model, lambda engine: results(engine, ids, mask), wire=wire, weights="sharded", **layout), want)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_give_what_whole_weights_give(name, place):
    model, (ids, mask) = build(llama_gqa(num_hidden_layers=3)), batch_of(50, 33, 7, 50)
    degree = {"weights_degree": LAYOUTS[name].get("weights_degree")}
    layout = {key: value for key, value in LAYOUTS[name].items() if key != "weights_degree"}
    want = serve(model, lambda engine: results(engine, ids, mask), **layout)
    got = serve(model, lambda engine: results(engine, ids, mask), weights=place, **degree, **layout)
    assert_same(got, want)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_scores_are_those_of_whole_weights(name, place):
    """The head is asked as often as a rank has tokens to score, which differs from rank to rank."""
    model, (ids, mask) = build(MODELS[name]()), batch_of(50, 33, 7, 1)

    def work(engine):
        return engine.score(ids, mask, top_k=3, entropy=True, start=5)

    layout = {"ring_degree": 3, "micro_batch_size": 2}
    for got, want in zip(serve(model, work, weights=place, **layout), serve(model, work, **layout), strict=True):
        for mine, other in zip(got.log_probs, want.log_probs, strict=True):
            assert torch.allclose(mine, other, rtol=0, atol=1e-5)
        assert all(torch.equal(mine, other) for mine, other in zip(got.ranks, want.ranks, strict=True))


def test_a_padding_token_beyond_the_rows_that_are_asked_for():
    model, (ids, mask) = build(llama_gqa(pad_token_id=VOCAB - 1)), batch_of(9)
    assert_same(
        serve(model, lambda engine: results(engine, ids, mask), ring_degree=2, weights="sharded"),
        serve(model, lambda engine: results(engine, ids, mask), ring_degree=2),
    )


def test_one_rank_streams():
    model, (ids, mask) = build(gpt_neox(heads=4)), batch_of(40, 11)
    assert_same(
        serve(model, lambda engine: results(engine, ids, mask), weights="streamed"),
        serve(model, lambda engine: results(engine, ids, mask)),
    )


@pytest.mark.parametrize("in_flight", [2, 3, 5])
def test_micro_batches_in_flight_find_their_layers(in_flight):
    """Five of them, over an odd number of layers and over one layer more."""
    ids, mask = batch_of(24, 24, 9, 24, 17)
    for layers in (1, 2, 5, 6):
        model = build(llama_gqa(num_hidden_layers=layers))
        layout = {"ring_degree": 2, "interleave": "on", "in_flight": in_flight}
        want = serve(model, lambda engine: results(engine, ids, mask), wire="copy_engine", **layout)
        got = serve(model, lambda engine: results(engine, ids, mask), wire="copy_engine", weights="sharded", **layout)
        assert_same(got, want)


@pytest.mark.parametrize(
    ("model", "sliced"),
    [(llama_gqa, True), (lambda: qwen2(tie_word_embeddings=True), True), (mixtral, False), (gpt2, False)],
    ids=["llama", "tied", "mixtral", "no plan"],
)
@pytest.mark.parametrize("place", PLACES)
def test_generation_is_that_of_whole_weights(model, sliced, place):
    whole, (ids, mask) = build(model()), batch_of(30, 19)
    layout = {"ring_degree": 3 if model is llama_gqa else 2, "prefill_chunk": 12}

    def work(engine):
        assert engine.runner.decodes_sliced == (sliced and engine.run_config.weights != "whole")
        options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        out = engine.generate(ids, attention_mask=mask, max_new_tokens=64, eos_token_id=None, **options)
        return out.sequences, torch.stack(out.logits)

    got = serve(whole, work, weights=place, **layout)
    want = serve(whole, work, decode="whole", **layout)
    for (tokens, logits), (want_tokens, want_logits) in zip(got, want, strict=True):
        assert torch.equal(tokens, want_tokens)
        assert (logits - want_logits).abs().max() <= 2e-6 * want_logits.abs().max()


def test_slices_of_decoding_are_what_a_rank_holds():
    """Bit for bit the steps of whole weights that are read in slices."""
    model, (ids, mask) = build(llama_gqa()), batch_of(30, 19)

    def work(engine):
        return engine.generate(
            ids, attention_mask=mask, max_new_tokens=8, eos_token_id=None, do_sample=False,
            return_dict_in_generate=True, output_hidden_states=False, output_logits=True,
        ).logits  # fmt: skip

    want = serve(model, work, ring_degree=3, decode="sliced")
    got = serve(model, work, ring_degree=3, decode="sliced", weights="sharded")
    for mine, other in zip(got, want, strict=True):
        assert all((a - b).abs().max() <= 1e-6 * b.abs().max() for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize("ranks", [2, 3, 16])
def test_a_rank_holds_its_share_two_layers_and_norms(ranks):
    model = build(gpt_neox(heads=16, layers=12))
    everything = sum(p.nbytes for p in model.parameters())
    layer = sum(p.nbytes for p in model.gpt_neox.layers[0].parameters())
    small = sum(p.nbytes for p in model.parameters() if p.dim() < 2)

    def work(engine):
        weights = engine.runner.weights
        storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in engine.model.parameters()}
        return sum(storages.values()) + weights.parts.memory.nbytes, weights.nbytes

    for held, said in serve(model, work, ring_degree=ranks, weights="sharded"):
        assert held == said
        assert held <= 1.02 * (everything / ranks + 2 * layer + small)


def test_what_several_layers_share_stays_whole():
    model = build(llama_gqa(num_hidden_layers=4))
    model.model.layers[3].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    ids, mask = batch_of(20)
    want = serve(copy.deepcopy(model), lambda engine: results(engine, ids, mask), ring_degree=2)
    got = serve(model, lambda engine: results(engine, ids, mask), ring_degree=2, weights="sharded")
    assert_same(got, want)


def test_unequal_parts():
    assert bounds(10, 4) == (0, 3, 6, 9, 10)
    assert bounds(2, 4) == (0, 1, 2, 2, 2)
    assert bounds(8, 2) == (0, 4, 8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": "sharded"}, "weights=sharded needs ranks that share a sequence"),
        ({"weights": "sharded", "tp_size": 3}, "cannot be combined with tp_size=3"),
        ({"weights": "sharded", "ring_degree": 4, "weights_degree": 3}, "does not divide the 4 ranks"),
        ({"weights_degree": 2, "ring_degree": 2}, "counts with stage 3 alone"),
        ({"weights": "lost"}, "take one of whole, sharded, streamed"),
    ],
)
def test_refusals(options, said):
    error = outcome(lambda: serve(build(llama_gqa()), lambda engine: None, **options))
    assert error is not None
    assert said in str(error)
