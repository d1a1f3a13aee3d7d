"""Rotary frequencies that depend on the length: every rank, chunk and step has those of the whole sequence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ds_ring.engine.engine import Engine
from tests.helpers.generation import GREEDY, assert_same, on_all_ranks_alike, padded
from tests.helpers.mocked_world import relative_error, serve
from tests.helpers.rope_models import OTHERS, SWITCH, USUAL, reference_is_right, rope_model
from tests.helpers.tiny_models import logits, tokens

TOLERANCE = 1e-5
LENGTHS = (1, 7, 20, 30, 31, 32, 33, 34, 35, 40, 47, 63, 64, 65, 100, 127)
"""Around the switch at ``SWITCH`` tokens."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "one_rank": {},
    "ring2": {"ring_degree": 2},
    "ring3_contiguous": {"ring_degree": 3, "ring_impl": "contiguous"},
    "ulysses3": {"ulysses_degree": 3},
    "hybrid": {"ring_degree": 2, "ulysses_degree": 3},
    "pp2": {"pp_size": 2},
}


def cases(*layouts: str) -> pytest.MarkDecorator:
    """All ``layouts`` of the models of the usual kinds, and the last one of all other models."""
    pairs = [(name, layout) for name in USUAL for layout in layouts] + [(name, layouts[-1]) for name in OTHERS]
    return pytest.mark.parametrize(
        ("name", "layout"), [(n, LAYOUTS[layout]) for n, layout in pairs], ids=[f"{n}-{layout}" for n, layout in pairs]
    )


def alone(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of the unsharded model, which no earlier call has left a state in."""
    return logits(copy.deepcopy(model), ids)


@cases("one_rank", "ring2", "ring3_contiguous", "ulysses3", "pp2", "hybrid")
def test_logits_are_the_unsharded_models_on_both_sides_of_the_switch(name, layout):
    model = rope_model(name)
    texts = [tokens(1, length) for length in LENGTHS]

    def work(engine: Engine) -> list[Tensor]:
        return [engine(ids).logits for ids in texts]

    want = [alone(model, ids) for ids in texts]
    for results in serve(model, work, max_length=128, **layout):
        for ids, got, expected in zip(texts, results, want, strict=True):
            assert relative_error(got, expected) < TOLERANCE, ids.shape


@cases("one_rank", "ulysses3", "pp2", "hybrid")
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_sequences_of_one_batch_have_frequencies_of_their_own(name, layout, micro_batch_size):
    model, (ids, mask) = rope_model(name), padded([20, 60, 33, 32])

    def work(engine: Engine) -> tuple[Tensor, list[Tensor]]:
        return engine(ids, mask).logits, engine.score(ids, mask).log_probs

    options = {"batch_size": 4, "micro_batch_size": micro_batch_size, "max_length": 128}
    for got, scores in serve(model, work, **options, **layout):
        for sequence in range(4):
            own = ids[sequence, mask[sequence].bool()][None]
            want = alone(model, own)
            assert relative_error(got[sequence, mask[sequence].bool()], want[0]) < TOLERANCE
            log_probs = want[0, :-1].log_softmax(-1).gather(1, own[0, 1:, None])[:, 0]
            assert relative_error(scores[sequence], log_probs) < TOLERANCE


@pytest.mark.parametrize("chunk", [1, 3, 16, 33, 64])
@cases("one_rank", "pp2", "hybrid")
def test_a_prompt_in_chunks_has_the_frequencies_of_the_whole(name, chunk, layout):
    model, ids = rope_model(name), tokens(1, 50, seed=3).clamp(min=1)
    want = generated(model, ids, 3)

    def work(engine: Engine) -> Any:
        return engine.generate(ids, torch.ones_like(ids), max_new_tokens=3, prefill_chunk_size=chunk, **GREEDY)

    assert_same(on_all_ranks_alike(serve(model, work, max_length=128, **layout)), want)


@cases("one_rank", "ring2", "ring3_contiguous", "ulysses3", "pp2", "hybrid")
def test_generation_across_the_switch(name, layout):
    """Phi-3 runs the whole text anew there, as others do not; both as transformers does."""
    skip_without_reference(name)
    model, ids = rope_model(name), tokens(1, SWITCH - 4, seed=5).clamp(min=1)
    want = generated(model, ids, 12)

    def work(engine: Engine) -> Any:
        return engine.generate(ids, torch.ones_like(ids), max_new_tokens=12, **GREEDY)

    assert_same(on_all_ranks_alike(serve(model, work, max_length=128, **layout)), want)


@cases("one_rank", "pp2", "hybrid")
def test_sequences_of_a_batch_cross_the_switch_one_by_one(name, layout):
    skip_without_reference(name)
    model, (ids, mask) = rope_model(name), padded([SWITCH - 7, SWITCH - 2, SWITCH + 5])

    def work(engine: Engine) -> Any:
        return engine.generate(ids, mask, max_new_tokens=10, **GREEDY)

    options = {"batch_size": 3, "micro_batch_size": 3, "max_length": 128}
    got = on_all_ranks_alike(serve(model, work, **options, **layout))
    for sequence in range(3):
        want = generated(model, ids[sequence, mask[sequence].bool()][None], 10)
        assert torch.equal(got.sequences[sequence, -10:], want.sequences[0, -10:])
        for own, other in zip(got.logits, want.logits, strict=True):
            assert relative_error(own[sequence], other[0]) < TOLERANCE


@cases("one_rank", "ulysses3", "pp2", "ring2")
@pytest.mark.parametrize(("first", "more"), [(20, 8), (26, 40), (40, 9)])
def test_a_second_turn_across_the_switch(name, first, more, layout):
    if first + 4 <= SWITCH < first + more + 8:
        skip_without_reference(name)
    model = rope_model(name)
    ids, question = tokens(1, first, seed=7).clamp(min=1), tokens(1, more, seed=8).clamp(min=1)

    def converse(model: Any) -> list[Any]:
        begun = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, **GREEDY)
        whole = torch.cat((begun.sequences, question), 1)
        after = model.generate(
            whole, attention_mask=torch.ones_like(whole), past_key_values=begun.past_key_values, max_new_tokens=4,
            **GREEDY,
        )  # fmt: skip
        return [begun, after]

    with torch.no_grad():
        want = converse(copy.deepcopy(model))
    turns = zip(*serve(model, converse, max_length=128, **layout), strict=True)
    for got, expected in zip(turns, want, strict=True):
        assert_same(on_all_ranks_alike(list(got)), expected)


def skip_without_reference(name: str) -> None:
    if not reference_is_right(name):
        pytest.skip("this release of transformers drops its cache there, and all tokens but the last with it")


def generated(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> Any:
    with torch.no_grad():
        return copy.deepcopy(model).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **GREEDY
        )
