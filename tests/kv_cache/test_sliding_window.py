"""What windowed layers keep of a cache: all that can be seen, and no more."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_ring.attention.backends.positions import EMPTY
from ds_ring.engine.engine import Engine
from ds_ring.errors import UnsupportedModelError
from ds_ring.kv_cache.shard import KVCacheShard
from ds_ring.kv_cache.sliding_window import SlidingWindowSlots
from tests.helpers.generation import GREEDY, assert_as_alone, on_all_ranks_alike, padded, tokens
from tests.helpers.mocked_world import serve
from tests.helpers.tiny_models import build, gemma3, mistral, shared

CPU = torch.device("cpu")


def visible(positions_S: torch.Tensor, at: int, window: int) -> list[int]:
    return sorted(p for p in positions_S.tolist() if at - window < p <= at)


@settings(max_examples=60)
@given(window=st.integers(1, 9), data=st.data())
def test_whatever_a_query_sees_is_there(window, data):
    """Chunks and single tokens of two rows; of every token, whether it is this rank's and whether it is padding."""
    slots, seen, last = SlidingWindowSlots(2, window, CPU), [[], []], [-1, -1]
    used = 0
    for _ in range(data.draw(st.integers(1, 6))):
        if data.draw(st.booleans()):
            length = data.draw(st.integers(1, 25))
            mine = data.draw(st.lists(st.integers(0, length - 1), unique=True, max_size=length).map(sorted))
            lengths = [data.draw(st.integers(1, length)) for _ in range(2)]
            positions = torch.full((2, len(mine)), EMPTY, dtype=torch.int32)
            for sequence, n in enumerate(lengths):
                for i, column in enumerate(mine):
                    if column < n:
                        positions[sequence, i] = last[sequence] + 1 + column
            used += len(mine)
            slots.make_room(used)
            before = [list(sequence) for sequence in seen]
            entry = slots.enter(slice(0, 2), positions)
            for sequence, n in enumerate(lengths):
                seen[sequence] += [p for p in positions[sequence].tolist() if p != EMPTY]
                for at in range(last[sequence] + 1, last[sequence] + 1 + n):
                    wanted = [p for p in before[sequence] if at - window < p]
                    assert visible(entry.before_BS[sequence], at, window) == wanted
                last[sequence] += n
        else:
            stored = data.draw(st.booleans())
            used += stored
            slots.make_room(used)
            at = torch.tensor([[last[0] + 1], [last[1] + 1]], dtype=torch.int32)
            taken = slots.enter_token(torch.tensor([stored]), at)
            assert (taken > 0).all() == stored
            for sequence in range(2):
                last[sequence] += 1
                seen[sequence] += [last[sequence]] * stored
        for sequence in range(2):
            assert visible(slots.positions_BS[sequence], last[sequence], window) == [
                p for p in seen[sequence] if last[sequence] - window < p
            ]
    assert slots.positions_BS.shape[1] <= slots.held(used) <= window + 1
    assert (slots.positions_BS[:, 0] == EMPTY).all()


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "gpt_oss"])
@pytest.mark.parametrize(
    "layout", [{}, {"ring_degree": 3, "ring_variant": "pass_kv"}, {"ring_degree": 2, "ring_variant": "pass_q"}], ids=str
)
def test_chunks_and_turns_longer_than_the_window(name, layout):
    """Left-padded rows; chunks of 40 tokens and a turn of 60 before a window of 24."""
    model, (ids, mask), more = shared(name), padded([101, 9]), tokens(2, 60, seed=1)

    def work(engine: Engine):
        begun = engine.generate(ids, mask, max_new_tokens=4, **GREEDY)
        whole = torch.cat((begun.sequences, more), 1)
        seen = torch.cat((mask, torch.ones(2, 64).long()), 1)
        return seen, engine.generate(whole, seen, past_key_values=begun.past_key_values, max_new_tokens=26, **GREEDY)

    results = serve(model, work, batch_size=2, micro_batch_size=2, prefill_chunk=40, **layout)
    got = on_all_ranks_alike([found for _, found in results])
    assert_as_alone(model, got.sequences[:, :-26], results[0][0], got)


@pytest.mark.parametrize("layout", [{}, {"ring_degree": 2}], ids=str)
@pytest.mark.parametrize(("config", "full_layers"), [(mistral, 0), (gemma3, 1)])
def test_windowed_layers_stop_growing(config, full_layers, layout):
    model, window = build(config()), 24

    def work(engine: Engine) -> list[tuple[int, int, int]]:
        found, cache, ids = [], None, tokens(2, 90)
        for _ in range(3):
            begun = engine.generate(ids, past_key_values=cache, max_new_tokens=30, **GREEDY)
            ids, cache = begun.sequences, begun.past_key_values
            layers = [pair[0] for pair in cache.cache_shard._layers]
            short = [k for k in layers if k.shape[1] == window + 1]
            found.append((len(short), sum(k.nbytes for k in short), cache.memory_bytes()))
        return found

    for turns in serve(model, work, batch_size=2, micro_batch_size=2, **layout):
        counts, windowed, whole = zip(*turns, strict=True)
        assert set(counts) == {model.config.num_hidden_layers - full_layers}
        assert len(set(windowed)) == 1
        assert whole[2] > whole[0]  # positions, and the layers that see everything


def test_a_layer_keeps_its_window():
    cache_shard, new = KVCacheShard(1, layers=1, rank=0, size=1, device=CPU), torch.zeros(1, 3, 1, 4)
    cache_shard.reserve(slice(0, 1), 0, torch.arange(3).int()[None])
    slots_BT = cache_shard.window(2).enter(slice(0, 1), torch.arange(3).int()[None]).slots_BT
    cache_shard.write_window(0, 2, slice(0, 1), slots_BT, new, new)
    with pytest.raises(UnsupportedModelError, match="layer 0 attends with a window of None behind one of 2"):
        cache_shard.write(0, slice(0, 1), 0, new, new)


def test_hidden_columns_are_forgotten_in_windows():
    cache_shard = KVCacheShard(1, layers=1, rank=0, size=1, device=CPU)
    positions_BT = torch.arange(5).int()[None]
    cache_shard.reserve(slice(0, 1), 0, positions_BT)
    cache_shard.window(3).enter(slice(0, 1), positions_BT)
    hidden_BC = torch.zeros(1, 5, dtype=torch.bool)
    hidden_BC[0, 3] = True
    cache_shard.hide(hidden_BC, torch.tensor([0]))
    assert sorted(cache_shard.window(3).positions_BS[0].tolist()) == [2, 4, EMPTY, EMPTY]
