"""Chunks and turns behind a cached prefix: what all rows have there is attended to without looking at positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from ds_ring.engine.engine import Engine
from ds_ring.kv_cache import attention
from ds_ring.kv_cache.occupancy import Occupancy
from tests.helpers.generation import (
    GREEDY,
    PROMPT,
    assert_as_alone,
    by_name,
    llama,
    on_all_ranks_alike,
    padded,
    tokens,
)
from tests.helpers.mocked_world import serve
from tests.helpers.tiny_models import shared


class TestFilledSlots:
    def test_slots_that_follow_each_other_are_one_run_and_padding_is_a_gap(self):
        occupancy = Occupancy(1, 2)
        for rank, start, count in ((0, 0, 4), (1, 0, 3), (0, 4, 2), (1, 4, 2), (1, 6, 0)):
            occupancy.add(0, rank, start, count)
        occupancy.add_to_all(0, 6)
        assert occupancy.of(slice(0, 1), 0) == (slice(0, 7),)
        assert occupancy.of(slice(0, 1), 1) == (slice(0, 3), slice(4, 6))

    def test_rows_share_what_they_have_up_to_where_they_differ(self):
        occupancy = Occupancy(3, 1)
        for sequence, runs in enumerate([[(0, 9), (12, 3), (20, 1)], [(0, 9), (12, 2), (20, 1)], [(0, 15)]]):
            for start, count in runs:
                occupancy.add(sequence, 0, start, count)
        assert occupancy.of(slice(0, 2), 0) == (slice(0, 9), slice(12, 14))
        assert occupancy.of(slice(0, 3), 0) == (slice(0, 9),)
        assert occupancy.of(slice(2, 3), 0) == (slice(0, 15),)

    @given(st.lists(st.sets(st.integers(0, 12)), min_size=1, max_size=4))
    def test_any_slots(self, sequences):
        occupancy = Occupancy(len(sequences), 1)
        for sequence, slots in enumerate(sequences):
            for slot in sorted(slots):
                occupancy.add(sequence, 0, slot, 1)
        found = [slot for run in occupancy.of(slice(0, len(sequences)), 0) for slot in range(run.start, run.stop)]
        unlike = min(set.union(*sequences) - set.intersection(*sequences), default=13)
        assert found == sorted(slot for slot in sequences[0] if slot < unlike)

    def test_a_row_that_lost_tokens_has_none_that_are_known(self):
        occupancy = Occupancy(2, 1)
        for sequence in range(2):
            occupancy.add(sequence, 0, 0, 4)
        occupancy.lose([1])
        occupancy.add(1, 0, 4, 4)
        assert occupancy.of(slice(0, 1), 0) == (slice(0, 4),)
        assert occupancy.of(slice(0, 2), 0) == occupancy.of(slice(1, 2), 0) == ()


@pytest.fixture
def folded(monkeypatch) -> list[int]:
    """How many keys each call got that looked at no positions; any number of queries is enough for one."""
    keys: list[int] = []
    fold = attention.accumulate_

    def folds(out: Tensor, lse: Tensor, q: Tensor, k_BSKD: Tensor, v: Tensor, **options: Any) -> None:
        keys.append(k_BSKD.shape[1])
        fold(out, lse, q, k_BSKD, v, **options)

    monkeypatch.setattr(attention, "accumulate_", folds)
    monkeypatch.setattr(attention, "MANY_QUERIES", 1)
    return keys


@pytest.mark.parametrize("name", ["llama_gqa", "mistral", "gemma2", "gpt_oss"])
@by_name("single", "ring3", "ulysses3_ring2", "pp2", "dp2_ring2")
def test_a_conversation_in_chunks_is_what_it_is_at_once(name, layout, folded):
    """The prompt's last chunk leaves gaps; a turn of 11 begins behind decoded tokens, of which ranks have unequally
    many."""
    model, first, more = shared(name), tokens(2, PROMPT), tokens(2, 11, seed=1)

    def work(engine: Engine) -> GenerateDecoderOnlyOutput:
        begun = engine.generate(first, max_new_tokens=5, **GREEDY)
        ids = torch.cat((begun.sequences, more), 1)
        return engine.generate(ids, past_key_values=begun.past_key_values, max_new_tokens=5, **GREEDY)

    options = {"batch_size": 2, "micro_batch_size": 2, "prefill_chunk": 7} | layout
    got = on_all_ranks_alike(serve(model, work, **options))
    assert_as_alone(model, got.sequences[:, :-5], torch.ones(2, got.sequences.shape[1] - 5).long(), got)
    assert folded or name == "mistral"  # whose layers all see a window
    assert max(folded, default=PROMPT) >= PROMPT // 7


@pytest.mark.parametrize("micro_batch_size", [1, 3])
@by_name("ring3", "ulysses3_ring2", "pp2")
def test_rows_of_unequal_lengths_too(layout, micro_batch_size, folded):
    """Each by itself, or what three have in common; in the second turn behind gaps where they ended."""
    ids, mask = padded([PROMPT, PROMPT - 9, 3])
    more = tokens(3, 11, seed=1)

    def work(engine: Engine) -> GenerateDecoderOnlyOutput:
        begun = engine.generate(ids, mask, max_new_tokens=5, **GREEDY)
        again = torch.cat((begun.sequences, more), 1)
        seen = torch.cat((mask, torch.ones(3, again.shape[1] - mask.shape[1]).long()), 1)
        return engine.generate(again, seen, past_key_values=begun.past_key_values, max_new_tokens=5, **GREEDY)

    options = {"batch_size": 3, "micro_batch_size": micro_batch_size, "prefill_chunk": 12} | layout
    got = on_all_ranks_alike(serve(llama(), work, **options))
    seen = torch.cat((mask, torch.ones(3, got.sequences.shape[1] - 5 - mask.shape[1]).long()), 1)
    assert_as_alone(llama(), got.sequences[:, :-5], seen, got)
    assert folded


def test_a_row_that_lost_tokens_goes_by_positions(folded):
    ids, more = tokens(1, PROMPT), tokens(1, 11, seed=1)
    seen = torch.ones(1, PROMPT + 5 + 11).long()
    seen[:, PROMPT + 2 : PROMPT + 5] = 0

    def work(engine: Engine) -> GenerateDecoderOnlyOutput:
        begun = engine.generate(ids, max_new_tokens=5, **GREEDY)
        again = torch.cat((begun.sequences, more), 1)
        return engine.generate(again, seen, past_key_values=begun.past_key_values, max_new_tokens=5, **GREEDY)

    got = on_all_ranks_alike(serve(llama(), work, ring_degree=2))
    assert_as_alone(llama(), got.sequences[:, :-5], seen, got)
    assert not folded
