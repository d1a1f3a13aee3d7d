"""Chunks and turns behind a cached prefix that all rows have in common: attended to without looking at positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generated import GREEDY, PROMPT, assert_rows_as_alone, by_name, llama, on_all_ranks_alike, padded, tokens
from mocked_world import serve
from tiny_models import ARCHITECTURES, build
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from ds_ring.attention import cached
from ds_ring.attention.common import CommonSlots
from ds_ring.engines.base import Engine


class TestCommonSlots:
    def test_slots_that_follow_each_other_are_one_run_and_padding_is_a_gap(self):
        common = CommonSlots(2)
        for rank, start, count in ((0, 0, 4), (1, 0, 3), (0, 4, 2), (1, 4, 2), (0, 6, 1), (1, 6, 0)):
            common.add(rank, start, count)
        assert common.of(0) == (slice(0, 7),)
        assert common.of(1) == (slice(0, 3), slice(4, 6))

    def test_rows_that_are_unlike_once_have_nothing_in_common(self):
        common = CommonSlots(1)
        common.add(0, 0, 4)
        common.end()
        common.add(0, 4, 4)
        assert common.of(0) == ()


@pytest.fixture
def folded(monkeypatch) -> list[int]:
    """How many keys each call got that looked at no positions; any number of queries is enough for one."""
    keys: list[int] = []
    fold = cached.accumulate_

    def folds(out: Tensor, lse: Tensor, q: Tensor, k_BSKD: Tensor, v: Tensor, **options: Any) -> None:
        keys.append(k_BSKD.shape[1])
        fold(out, lse, q, k_BSKD, v, **options)

    monkeypatch.setattr(cached, "accumulate_", folds)
    monkeypatch.setattr(cached, "MANY_ROWS", 1)
    return keys


@pytest.mark.parametrize("name", ["llama_gqa", "mistral", "gemma2", "gpt_oss"])
@by_name("single", "ring3", "ulysses3_ring2", "pp2", "dp2_ring2")
def test_a_conversation_in_chunks_is_what_it_is_at_once(name, layout, folded):
    """The prompt's last chunk leaves gaps; a turn of 11 begins behind decoded tokens, of which ranks have unequally
    many."""
    model, first, more = build(ARCHITECTURES[name]()), tokens(2, PROMPT), tokens(2, 11, seed=1)

    def work(engine: Engine) -> GenerateDecoderOnlyOutput:
        begun = engine.generate(first, max_new_tokens=5, **GREEDY)
        ids = torch.cat((begun.sequences, more), 1)
        return engine.generate(ids, past_key_values=begun.past_key_values, max_new_tokens=5, **GREEDY)

    options = {"batch_size": 2, "micro_batch_size": 2, "prefill_chunk": 7} | layout
    got = on_all_ranks_alike(serve(model, work, **options))
    assert_rows_as_alone(model, got.sequences[:, :-5], torch.ones(2, got.sequences.shape[1] - 5).long(), got)
    assert folded or name == "mistral"  # whose layers all see a window
    assert max(folded, default=PROMPT) >= PROMPT // 7


@by_name("ring3", "pp2")
def test_rows_that_were_unequal_once_go_by_positions(layout, folded):
    ids, mask = padded([PROMPT, PROMPT - 9])
    more = tokens(2, 11, seed=1)

    def work(engine: Engine) -> GenerateDecoderOnlyOutput:
        begun = engine.generate(ids, mask, max_new_tokens=5, **GREEDY)
        again = torch.cat((begun.sequences, more), 1)
        seen = torch.cat((mask, torch.ones(2, again.shape[1] - mask.shape[1]).long()), 1)
        return engine.generate(again, seen, past_key_values=begun.past_key_values, max_new_tokens=5, **GREEDY)

    options = {"batch_size": 2, "micro_batch_size": 2, "prefill_chunk": 2 * PROMPT} | layout
    got = on_all_ranks_alike(serve(llama(), work, **options))
    seen = torch.cat((mask, torch.ones(2, got.sequences.shape[1] - 5 - mask.shape[1]).long()), 1)
    assert_rows_as_alone(llama(), got.sequences[:, :-5], seen, got)
    assert not folded
