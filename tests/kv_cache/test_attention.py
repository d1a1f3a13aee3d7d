"""Attention against keys that stand anywhere and are spread over ranks, held against the fp64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ds_ring.attention.backends.positions import BLIND, EMPTY, attend_positions
from ds_ring.attention.merge import merge_, merge_all
from ds_ring.attention.reference import reference_attention
from ds_ring.attention.spec import AttentionSpec
from ds_ring.kv_cache import attention as cached_attention
from ds_ring.kv_cache.attention import attend_replicated, attend_spread, pass_kv_bytes, pass_q_bytes
from ds_ring.kv_cache.shard import LOOK_AHEAD, Cached, KVCacheShard
from tests.helpers.attention_problems import GARBAGE, sink_reference
from tests.helpers.worlds import in_group

SPECS = {
    "plain": AttentionSpec(0.4),
    "window": AttentionSpec(0.4, window=5),
    "softcap": AttentionSpec(0.4, softcap=1.5),
    "both": AttentionSpec(0.4, window=7, softcap=1.5),
}
LENGTHS = (19, 1, 12)
"""Tokens of each row."""
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(slots: int = 25, seed: int = 0) -> tuple[Cached, list[Tensor]]:
    """Rows of LENGTHS tokens scattered over more slots in random order, the others garbage; and where each token is."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.full((len(LENGTHS), slots), EMPTY, dtype=torch.int32)
    places = []
    for sequence, n in enumerate(LENGTHS):
        places.append(torch.randperm(slots, generator=generator)[:n])
        positions[sequence, places[-1]] = torch.arange(n, dtype=torch.int32)
    k, v = (
        random(len(LENGTHS), slots, KV_HEADS, HEAD_DIM, seed=seed),
        random(3, slots, KV_HEADS, HEAD_DIM, seed=seed + 1),
    )
    empty = positions == EMPTY
    k[empty], v[empty] = GARBAGE, GARBAGE
    return Cached(k, v, positions), places


def expected(q: Tensor, q_positions: Tensor, spec: AttentionSpec, cached: Cached, places: list[Tensor]):
    """fp64, token by token: a query at position p sees its row's first p + 1 tokens."""
    outs, lses = torch.zeros(q.shape).double(), torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf).double()
    for sequence, reserve in enumerate(places):
        k, v = cached.k_BSKD[sequence, reserve][None], cached.v_BSKD[sequence, reserve][None]
        for i, p in enumerate(q_positions[sequence].tolist()):
            if p != BLIND:
                out, lse = reference_attention(q[sequence, i][None, None], k, v, spec=spec, q_offset=p)
                outs[sequence, i], lses[sequence, :, i] = out[0, 0], lse[0, :, 0]
    return outs, lses


def queries(count: int) -> tuple[Tensor, Tensor]:
    """Queries at unequal positions, within and behind the rows, some of them padding."""
    positions = torch.stack([torch.arange(count) + n - 2 for n in LENGTHS]).int()
    positions[1, count // 2 :] = BLIND
    positions[0, 0] = BLIND
    return random(3, count, HEADS, HEAD_DIM, seed=7), positions


@pytest.mark.parametrize("count", [1, 4, 9])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_positions_decide_what_is_seen(spec, count, monkeypatch):
    monkeypatch.setattr("ds_ring.attention.backends.eager.SCORES_LIMIT", 3 * HEADS * 25 * 2)
    (cached, places), (q, positions) = problem(), queries(count)
    out, lse = attend_positions(
        q, cached.k_BSKD, cached.v_BSKD, q_positions_BL=positions, k_positions_BS=cached.positions_BS, spec=spec
    )
    want_out, want_lse = expected(q, positions, spec, cached, places)
    torch.testing.assert_close(out.double(), want_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    assert lse.dtype == torch.float32
    blind = positions == BLIND
    assert not out[blind].any()
    assert (lse.transpose(1, 2)[blind] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_fp32(dtype):
    (cached, places), (q, positions) = problem(), queries(4)
    half = Cached(cached.k_BSKD.to(dtype), cached.v_BSKD.to(dtype), cached.positions_BS)
    out, lse = attend_positions(
        q.to(dtype), half.k_BSKD, half.v_BSKD, q_positions_BL=positions, k_positions_BS=half.positions_BS,
        spec=SPECS["plain"], out_dtype=torch.float32,
    )  # fmt: skip
    want_out, want_lse = expected(q.to(dtype), positions, SPECS["plain"], half, places)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), want_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


def test_no_keys_at_all():
    q, positions = queries(3)
    none = q.new_zeros(3, 0, KV_HEADS, HEAD_DIM)
    out, lse = attend_positions(
        q, none, none, q_positions_BL=positions, k_positions_BS=torch.zeros(3, 0).int(), spec=SPECS["plain"]
    )
    assert not out.any()
    assert (lse == -torch.inf).all()


def share(cached: Cached, rank: int, size: int) -> Cached:
    """Every size-th slot, so that ranks hold unequal parts, and for some rows nothing."""
    return Cached(*(t[:, rank::size] for t in cached))


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_new_token_that_all_ranks_have(size, spec, with_sinks):
    (cached, places), (q, positions) = problem(), queries(1)
    sinks = random(HEADS, seed=9) if with_sinks else None

    def work(transport):
        own = share(cached, transport.rank, size)
        return attend_replicated(q, own, q_positions_BL=positions, spec=spec, transport=transport, sinks_H=sinks)

    out, lse = expected(q, positions, spec, cached, places)
    want = out if sinks is None else sink_reference(out, lse, sinks).nan_to_num(0.0)
    results = in_group(size, work)
    for got in results:
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        assert torch.equal(got, results[0])


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("variant", ["pass_q", "pass_kv", "auto"])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_chunk_that_is_spread_like_the_cache(size, variant, spec, with_sinks):
    (cached, places), (q, positions) = problem(), queries(3 * size)
    sinks = random(HEADS, seed=9) if with_sinks else None
    held = [share(cached, rank, size).positions_BS.shape[1] for rank in range(size)]

    def work(transport):
        mine = slice(3 * transport.rank, 3 * transport.rank + 3)
        own = share(cached, transport.rank, size)
        got = attend_spread(
            q[:, mine], own, q_positions_BL=positions[:, mine], held=held, spec=spec, transport=transport,
            sinks_H=sinks, variant=variant,
        )  # fmt: skip
        return (
            got,
            dict(transport.traffic.bytes_by_op),
            pass_q_bytes(q[:, mine]),
            pass_kv_bytes(own, held[transport.rank]),
        )

    out, lse = expected(q, positions, spec, cached, places)
    want = out if sinks is None else sink_reference(out, lse, sinks).nan_to_num(0.0)
    results = in_group(size, work)
    torch.testing.assert_close(torch.cat([r[0] for r in results], 1).double(), want, rtol=1e-5, atol=1e-5)
    for _, sent, by_q, by_kv in results:
        # A chunk of 3 tokens a rank against 7 to 9 slots: the results in fp32 weigh more than these keys and values.
        assert sum(sent.values()) == (size - 1) * (by_q if variant == "pass_q" else by_kv)


@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize("spec", [SPECS["plain"], SPECS["softcap"]], ids=["plain", "softcap"])
@pytest.mark.parametrize("variant", ["pass_q", "pass_kv"])
@pytest.mark.parametrize("size", [1, 3])
def test_many_queries_see_what_all_rows_have_in_common_without_positions(size, variant, spec, many, monkeypatch):
    """Tokens in slots with gaps of garbage, and behind them a chunk of four a rank, the last of which is padding."""
    monkeypatch.setattr(cached_attention, "MANY_QUERIES", 1 if many else 1000)
    calls: list[bool] = []
    fold = cached_attention.accumulate_

    def folds(*tensors: Tensor, causal: bool, **options: Any) -> None:
        calls.append(causal)
        fold(*tensors, causal=causal, **options)

    monkeypatch.setattr(cached_attention, "accumulate_", folds)
    sequences, chunk, slots = 2, 4 * size, 9 * 3
    seen_by_size = {1: [(slice(0, 7), slice(9, 15))], 3: [(slice(0, 2), slice(3, 5)), (slice(0, 5),), (slice(1, 4),)]}
    seen, first = seen_by_size[size], slots // size - 4
    positions = torch.full((sequences, slots), EMPTY, dtype=torch.int32)
    places = [rank * (slots // size) + i for rank, runs in enumerate(seen) for run in runs for i in range(slots)[run]]
    before = len(places)
    places += [rank * (slots // size) + first + i for rank in range(size) for i in range(4)][:-1]
    positions[:, places] = torch.arange(before + chunk - 1, dtype=torch.int32)
    k, v = random(sequences, slots, KV_HEADS, HEAD_DIM, seed=3), random(sequences, slots, KV_HEADS, HEAD_DIM, seed=4)
    k[positions == EMPTY], v[positions == EMPTY] = GARBAGE, GARBAGE
    cached, q = Cached(k, v, positions), random(sequences, chunk, HEADS, HEAD_DIM, seed=5)
    q_positions = torch.arange(before, before + chunk, dtype=torch.int32).repeat(sequences, 1)
    q_positions[:, -1] = BLIND

    def work(transport):
        mine = slice(4 * transport.rank, 4 * transport.rank + 4)
        here = slice(slots // size * transport.rank, slots // size * (transport.rank + 1))
        return attend_spread(
            q[:, mine], Cached(*(t[:, here] for t in cached)), q_positions_BL=q_positions[:, mine],
            held=[slots // size] * size, spec=spec, transport=transport, seen=seen, variant=variant,
        )  # fmt: skip

    got = torch.cat(in_group(size, work), 1)
    want, _ = expected(q, q_positions, spec, cached, [torch.tensor(places)] * sequences)
    torch.testing.assert_close(got[:, :-1].double(), want[:, :-1], rtol=1e-5, atol=1e-5)
    assert got[:, -1].isfinite().all()
    rounds = size if variant == "pass_kv" else 1
    assert calls == [False] * (rounds * sum(map(len, seen)) if many else 0)


def test_auto_moves_queries_where_the_prefix_is_long():
    def bytes_for(slots: int) -> int:
        cached = Cached(
            torch.zeros(1, slots, KV_HEADS, HEAD_DIM), torch.zeros(1, slots, KV_HEADS, HEAD_DIM),
            torch.zeros(1, slots, dtype=torch.int32),
        )  # fmt: skip

        def work(transport):
            q, positions = torch.zeros(1, 3, HEADS, HEAD_DIM), torch.zeros(1, 3, dtype=torch.int32)
            attend_spread(
                q, cached, q_positions_BL=positions, held=[slots] * 2, spec=SPECS["plain"], transport=transport
            )
            return transport.traffic.bytes_sent

        (sent, _) = in_group(2, work)
        return sent

    assert bytes_for(4) < bytes_for(8) < bytes_for(100) == bytes_for(1000)


def test_merging_all_at_once_is_merging_one_by_one():
    outs, lses = random(4, 2, 3, HEADS, HEAD_DIM), 5 * random(4, 2, HEADS, 3, seed=1)
    lses[1, 0], lses[:, 1, 0] = -torch.inf, -torch.inf
    outs[1, 0], outs[:, 1, :, 0] = 0, 0
    out, lse = outs[0].clone(), lses[0].clone()
    for other in range(1, 4):
        merge_(out, lse, outs[other], lses[other])
    got_out, got_lse = merge_all(outs, lses)
    torch.testing.assert_close(got_out, out)
    torch.testing.assert_close(got_lse, lse)


class TestStore:
    def occupancy(self, sequences: int = 2) -> KVCacheShard:
        return KVCacheShard(sequences, layers=2, rank=0, size=3, device=torch.device("cpu"))

    def test_what_is_written_is_read_whatever_the_store_grew_to(self):
        cache_shard, written = self.occupancy(), []
        for start in range(0, 300, 30):
            cache_shard.reserve(slice(0, 2), start, torch.arange(start, start + 30).int().expand(2, 30))
            written.append(random(2, 30, KV_HEADS, HEAD_DIM, seed=start))
            for layer in range(2):
                cache_shard.write(layer, slice(0, 2), start, written[-1] + layer, written[-1] - layer)
        for layer in range(2):
            k, v, positions = cache_shard.read(layer, slice(0, 2), 300)
            assert torch.equal(k, torch.cat(written, 1) + layer)
            assert torch.equal(v, torch.cat(written, 1) - layer)
            assert torch.equal(positions, torch.arange(300).int().expand(2, 300))

    def test_slots_of_rows_that_were_not_written_are_empty_and_finite(self):
        cache_shard = self.occupancy()
        cache_shard.reserve(slice(1, 2), 0, torch.zeros(1, 1).int())
        cache_shard.write(0, slice(1, 2), 0, torch.ones(1, 1, KV_HEADS, HEAD_DIM), torch.ones(1, 1, KV_HEADS, HEAD_DIM))
        k, v, positions = cache_shard.read(0, slice(0, 2), 5)
        assert positions.tolist() == [[EMPTY] * 5, [0] + [EMPTY] * 4]
        assert torch.isfinite(k).all()
        assert torch.isfinite(v).all()

    def test_the_next_owner_holds_least_and_turns_are_taken(self):
        cache_shard, owners = self.occupancy(), []
        cache_shard.used = [4, 4, 4]
        for _ in range(7):
            owners.append(cache_shard.next_owner)
            cache_shard.used[owners[-1]] += 1
        assert owners == [0, 1, 2, 0, 1, 2, 0]

    def test_expected_tokens_get_room_at_once_and_no_more(self):
        cache_shard = self.occupancy(sequences=1)

        def put(start: int, count: int) -> int:
            cache_shard.reserve(slice(0, 1), start, torch.arange(start, start + count).int()[None])
            cache_shard.write(0, slice(0, 1), start, *(torch.ones(1, count, KV_HEADS, HEAD_DIM) for _ in range(2)))
            return cache_shard.nbytes // (2 * KV_HEADS * HEAD_DIM * 4 + 4)

        cache_shard.used = [1000, 990, 1000]
        cache_shard.expect(50)
        assert put(0, 1000) == 1015  # 2990 + 50 tokens over 3 ranks, and the slot that stays empty
        assert put(1000, 15) == 1015
        assert put(1015, 1) == 1522  # more than was expected: half as much again
        cache_shard.used = [1522] * 3
        cache_shard.expect(10**9)
        assert put(1522, 1) == 1522 + -(-LOOK_AHEAD // 3) + 1

    def test_a_token_goes_to_one_rank_and_to_a_slot_that_stays_empty_on_the_others(self):
        stores = [KVCacheShard(2, layers=1, rank=rank, size=2, device=torch.device("cpu")) for rank in range(2)]
        for token in range(5):
            for cache_shard in stores:
                slot_1 = torch.tensor([cache_shard.take_token()])
                cache_shard.reserve_token(slot_1, torch.tensor([[token], [token + 10]]).int())
                cache_shard.write_token(
                    0, slot_1, *(torch.full((2, 1, KV_HEADS, HEAD_DIM), 1.0 + token) for _ in range(2))
                )
        assert [cache_shard.used for cache_shard in stores] == [[3, 2]] * 2
        for rank, tokens in enumerate(([0, 2, 4], [1, 3])):
            k, _, positions = stores[rank].read(0)
            seen = positions[0] != EMPTY
            assert positions[:, seen].tolist() == [tokens, [token + 10 for token in tokens]]
            assert k[0, seen, 0, 0].tolist() == [1.0 + token for token in tokens]
            assert stores[rank].moves == 2  # its positions, and its one layer

    def test_hidden_columns_are_forgotten(self):
        cache_shard = self.occupancy()
        cache_shard.reserve(slice(0, 2), 0, torch.tensor([[2, 0, 1], [0, EMPTY, 3]]).int())
        # Row 1 starts at column 4: its position 3 stands in column 7.
        hidden = torch.zeros(2, 8, dtype=torch.bool)
        hidden[0, 1] = hidden[1, 7] = hidden[1, 5] = True
        cache_shard.hide(hidden, torch.tensor([0, 4]))
        cache_shard.write(0, slice(0, 2), 0, torch.ones(2, 3, KV_HEADS, HEAD_DIM), torch.ones(2, 3, KV_HEADS, HEAD_DIM))
        assert cache_shard.read(0, slice(0, 2), 3).positions_BS.tolist() == [[2, 0, EMPTY], [0, EMPTY, EMPTY]]
