"""Functions of the caller's in ``generate``: alike in kind on all ranks, and one choice of tokens whatever they do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from ds_ring.engine.engine import Engine
from ds_ring.errors import DisagreementError, InputError
from tests.helpers.generation import GREEDY, Heard, by_name, llama, on_all_ranks_alike, tokens, unsharded
from tests.helpers.mocked_world import outcome, serve


class Ban(LogitsProcessor):
    """One token is never chosen."""

    def __init__(self, token: int) -> None:
        self._token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.tensor([self._token]), -torch.inf)


class Draws(LogitsProcessor):
    """Takes numbers from the random state, and changes nothing."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        torch.rand(self._count)
        return scores


def never(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
    return torch.zeros(len(input_ids)).bool()


def some_tokens(sequence: int, ids: Tensor) -> list[int]:
    return [3, 5, 7]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"logits_processor": LogitsProcessorList([Ban(3)])}, "logits_processor: rank 0 has none, rank 1 has Ban"),
        ({"stopping_criteria": [never]}, "stopping_criteria: rank 0 has none, rank 1 has function"),
        ({"prefix_allowed_tokens_fn": some_tokens}, "prefix_allowed_tokens_fn: rank 0 has none, rank 1 has function"),
        ({"tokenizer": object()}, "tokenizer: rank 0 has none, rank 1 has object"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_one_rank_alone_is_given_is_named_on_all(options, words):
    def work(engine: Engine) -> Exception | None:
        return outcome(lambda: engine.generate(tokens(1, 20), **(options if engine.mesh.rank else {})))

    for error in serve(llama(), work, ring_degree=2):
        assert isinstance(error, DisagreementError)
        assert str(error) == f"ranks disagree on generate's {words}; make it the same on all ranks"


@by_name("ring3", "dp2_ring2", "tp3_pp2")
def test_all_ranks_take_the_tokens_and_scores_of_rank_0_where_callbacks_differ(layout):
    ids = tokens(2, 20)
    plain = unsharded(llama(), ids, max_new_tokens=6).sequences
    banned = int(plain[0, 20])
    want = unsharded(llama(), ids, max_new_tokens=6, logits_processor=LogitsProcessorList([Ban(banned)])).sequences
    assert not torch.equal(want, plain)

    def work(engine: Engine) -> Any:
        processors = [Ban(banned if engine.mesh.rank == 0 else 1 + engine.mesh.rank)]
        return engine.generate(ids, max_new_tokens=6, output_scores=True, logits_processor=processors, **GREEDY)

    results = serve(llama(), work, batch_size=2, **layout)
    assert torch.equal(on_all_ranks_alike(results).sequences, want)
    for found in results:
        for step, scores in enumerate(found.scores):
            assert torch.equal(scores, results[0].scores[step])
            assert scores[:, banned].tolist() == [-torch.inf] * 2


def test_sampling_is_the_same_on_all_ranks_where_a_callback_draws_numbers_on_one():
    ids, options = tokens(2, 20), {"do_sample": True, "temperature": 2.0, "top_k": 0, "max_new_tokens": 8}

    def work(engine: Engine) -> Tensor:
        processors = [Draws(engine.mesh.rank)]
        return engine.generate(ids, logits_processor=processors, **GREEDY | options).sequences

    first, *others = serve(llama(), work, ring_degree=3)
    assert first.shape == (2, 28)
    assert all(torch.equal(other, first) for other in others)


def test_one_rank_alone_may_stream():
    ids = tokens(1, 20)

    def work(engine: Engine) -> tuple[Heard, Tensor]:
        heard = Heard()
        streamer = {"streamer": heard} if engine.mesh.rank == 0 else {}
        return heard, engine.generate(ids, max_new_tokens=5, **streamer, **GREEDY).sequences

    want = unsharded(llama(), ids, max_new_tokens=5).sequences
    (heard, got), (_, other) = serve(llama(), work, ring_degree=2)
    assert torch.equal(got, want)
    assert torch.equal(other, want)
    assert heard.tokens == want[0].tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"logits_processor": 5}, "logits_processor must be a list of functions, not 5"),
        ({"logits_processor": [5]}, "logits_processor must be a list of functions, not [5]"),
        ({"stopping_criteria": "end"}, "stopping_criteria must be a list of functions, not 'end'"),
        ({"stopping_criteria": never}, "stopping_criteria must be a list of functions, not <function never"),
        ({"prefix_allowed_tokens_fn": [1]}, "prefix_allowed_tokens_fn must be a function, not [1]"),
        ({"progress": True}, "progress must be a function, not True"),
        ({"streamer": 5}, "streamer must be one of transformers' (BaseStreamer), not 5"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_cannot_be_called_is_refused(options, words):
    for error in serve(llama(), lambda e: outcome(lambda: e.generate(tokens(1, 8), **options)), ring_degree=2):
        assert isinstance(error, InputError)
        assert str(error).startswith(words)


def test_criteria_of_transformers_may_be_given_as_a_list():
    ids = tokens(1, 20)
    want = unsharded(llama(), ids, max_new_tokens=4).sequences
    for criteria in (StoppingCriteriaList([never]), (never,)):
        results = serve(
            llama(), lambda e, c=criteria: e.generate(ids, stopping_criteria=c, max_new_tokens=4, **GREEDY).sequences,
            ring_degree=2,
        )  # fmt: skip
        assert all(torch.equal(got, want) for got in results)
