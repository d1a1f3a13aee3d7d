"""Who holds which tokens, held against lists and loops that need no cleverness."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_ring.errors import ConfigError
from ds_ring.parallel.layout import Block, SequenceLayout, TokenRange

SPLITS = [
    (ring, ranks // ring) for ranks in (1, 2, 3, 4, 6, 8, 16) for ring in range(1, ranks + 1) if ranks % ring == 0
]
LENGTHS = (1, 2, 63, 1000, 1001, 10000)
IMPLS = ("zigzag", "contiguous")

layouts = st.builds(
    SequenceLayout,
    length=st.integers(1, 60),
    ring_degree=st.integers(1, 5),
    ulysses_degree=st.integers(1, 4),
    ring_impl=st.sampled_from(IMPLS),
)


def rank_pairs(layout: SequenceLayout) -> list[tuple[int, int]]:
    return [(q, k) for q in range(layout.ring_degree) for k in range(layout.ring_degree)]


def covered(blocks: list[Block], layout: SequenceLayout, window: int | None) -> list[tuple[int, int]]:
    """(query row, key row) of every pair that some block computes, by the block's own rule."""
    pairs = []
    for block in blocks:
        q_rows = range(layout.slice_length)[block.q_rows]
        k_rows = range(layout.slice_length)[block.k_rows]
        for i, q_row in enumerate(q_rows):
            for j, k_row in enumerate(k_rows):
                distance = (block.q_offset + i) - (block.k_offset + j)
                if not block.causal or (distance >= 0 and (window is None or distance < window)):
                    pairs.append((q_row, k_row))
    return pairs


def visible(layout: SequenceLayout, q_rank: int, k_rank: int, window: int | None) -> list[tuple[int, int]]:
    """(query row, key row) of every pair that global positions allow."""
    return [
        (i, j)
        for i, q in enumerate(layout.slice_positions(q_rank))
        for j, k in enumerate(layout.slice_positions(k_rank))
        if k <= q and (window is None or q - k < window)
    ]


@pytest.mark.parametrize("ring_impl", IMPLS)
@pytest.mark.parametrize(("ring", "ulysses"), SPLITS)
@pytest.mark.parametrize("length", LENGTHS)
def test_ranks_partition_the_padded_sequence(length, ring, ulysses, ring_impl):
    layout = SequenceLayout(length, ring, ulysses, ring_impl)
    shares = [layout.positions(r, u) for r in range(ring) for u in range(ulysses)]
    assert {len(share) for share in shares} == {layout.local_length}
    assert sorted(p for share in shares for p in share) == list(range(layout.padded_length))
    assert [p for share in shares[:ulysses] for p in share] == layout.slice_positions(0)


@pytest.mark.parametrize("ring_impl", IMPLS)
@pytest.mark.parametrize(("ring", "ulysses"), SPLITS)
@pytest.mark.parametrize("length", LENGTHS)
def test_padding_is_the_least_that_cuts_evenly(length, ring, ulysses, ring_impl):
    chunks = 2 if ring_impl == "zigzag" and ring > 1 else 1
    least = next(n for n in range(length, length + 1000) if n % (ring * chunks) == 0 and n % (ring * ulysses) == 0)
    layout = SequenceLayout(length, ring, ulysses, ring_impl)
    assert layout.padded_length == least
    assert (layout.slice_length, layout.local_length) == (least // ring, least // (ring * ulysses))


def test_ten_thousand_tokens_on_sixteen_ring_ranks_are_padded_to_the_next_multiple_of_32():
    assert SequenceLayout(10000, 16).padded_length == 10016
    assert SequenceLayout(10000, 2, 8).padded_length == 10000


@pytest.mark.parametrize("ulysses", [1, 2, 4])
def test_ulysses_ranks_hold_consecutive_parts_of_their_ring_ranks_slice(ulysses):
    layout = SequenceLayout(48, 3, ulysses)
    for r in range(3):
        assert [p for u in range(ulysses) for p in layout.positions(r, u)] == layout.slice_positions(r)


def test_zigzag_of_sixteen_tokens_on_two_ring_and_two_ulysses_ranks_by_hand():
    layout = SequenceLayout(16, 2, 2, "zigzag")
    assert layout.slice_ranges(0) == (TokenRange(0, 4), TokenRange(12, 4))
    assert layout.slice_ranges(1) == (TokenRange(4, 4), TokenRange(8, 4))
    assert layout.positions(0, 0) == [0, 1, 2, 3]
    assert layout.positions(0, 1) == [12, 13, 14, 15]
    assert layout.positions(1, 0) == [4, 5, 6, 7]
    assert layout.positions(1, 1) == [8, 9, 10, 11]
    # Rank 1's last query is 11: it sees only rank 0's first chunk. Rank 0's last is 15: it sees all of rank 1.
    assert layout.visible_rows(1, 0) == 4
    assert layout.visible_rows(0, 1) == 8
    assert layout.blocks(0, 0) == [Block(slice(0, 8), slice(0, 8), True, 0, 0)]
    assert layout.blocks(1, 0) == [Block(slice(0, 8), slice(0, 4), False, 0, 0)]
    assert layout.blocks(0, 1) == [Block(slice(4, 8), slice(0, 8), False, 0, 0)]


def test_contiguous_of_nine_tokens_on_three_ranks_by_hand():
    layout = SequenceLayout(9, 3, 1, "contiguous")
    assert [layout.positions(r) for r in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert layout.visible_rows(2, 0) == 3
    assert layout.visible_rows(0, 2) == 0
    assert layout.blocks(2, 0) == [Block(slice(0, 3), slice(0, 3), False, 0, 0)]
    assert layout.blocks(0, 2) == []


def test_windowed_blocks_leave_out_runs_that_no_query_reaches():
    layout = SequenceLayout(16, 4, 1, "contiguous")
    assert layout.windowed_blocks(3, 2, window=1) == []
    assert layout.windowed_blocks(3, 2, window=2) == [Block(slice(0, 4), slice(0, 4), True, 12, 8)]
    assert layout.windowed_blocks(3, 1, window=5) == []
    assert layout.windowed_blocks(3, 1, window=6) == [Block(slice(0, 4), slice(0, 4), True, 12, 4)]
    assert layout.windowed_blocks(1, 2, window=100) == []


@settings(max_examples=300)
@given(layout=layouts)
def test_visible_rows_is_what_the_last_query_sees_and_always_a_prefix(layout):
    for q_rank, k_rank in rank_pairs(layout):
        last_query = max(layout.slice_positions(q_rank))
        seen = [p <= last_query for p in layout.slice_positions(k_rank)]
        assert layout.visible_rows(q_rank, k_rank) == sum(seen)
        assert seen == sorted(seen, reverse=True)


@settings(max_examples=300)
@given(layout=layouts)
def test_blocks_cover_every_visible_pair_once_and_no_other(layout):
    for q_rank, k_rank in rank_pairs(layout):
        blocks = layout.blocks(q_rank, k_rank)
        assert sorted(covered(blocks, layout, None)) == visible(layout, q_rank, k_rank, None)
        # Only rows that were sent may be read.
        assert all(block.k_rows.stop <= layout.visible_rows(q_rank, k_rank) for block in blocks)


@settings(max_examples=300)
@given(layout=layouts, window=st.integers(1, 70))
def test_windowed_blocks_cover_every_visible_pair_once_and_no_other(layout, window):
    for q_rank, k_rank in rank_pairs(layout):
        blocks = layout.windowed_blocks(q_rank, k_rank, window)
        assert sorted(covered(blocks, layout, window)) == visible(layout, q_rank, k_rank, window)
        assert all(covered([block], layout, window) for block in blocks), "a block without a visible pair"
        assert all(block.k_rows.stop <= layout.visible_rows(q_rank, k_rank) for block in blocks)


@pytest.mark.parametrize("ring_impl", IMPLS)
@pytest.mark.parametrize("ring", [2, 3, 4, 8])
def test_two_different_ranks_need_one_attention_call(ring, ring_impl):
    layout = SequenceLayout(ring * 4, ring, 1, ring_impl)
    assert all(len(layout.blocks(q, k)) <= 1 for q, k in rank_pairs(layout) if q != k)


def pairs_of(layout: SequenceLayout, ring_rank: int) -> int:
    return sum(q + 1 for q in layout.slice_positions(ring_rank))


@pytest.mark.parametrize("ring", [2, 3, 4, 8, 16])
def test_zigzag_gives_every_rank_the_same_causal_work(ring):
    layout = SequenceLayout(ring * 12, ring, 1, "zigzag")
    assert len({pairs_of(layout, r) for r in range(ring)}) == 1


@pytest.mark.parametrize("ring", [2, 4, 8])
def test_contiguous_work_grows_with_the_rank(ring):
    layout = SequenceLayout(ring * 64, ring, 1, "contiguous")
    for r in range(ring):
        assert math.isclose(pairs_of(layout, r) / pairs_of(layout, 0), 2 * r + 1, rel_tol=0.05)


@settings(max_examples=200)
@given(layout=st.builds(SequenceLayout, length=st.integers(1, 3000), ring_degree=st.integers(1, 16),
                        ulysses_degree=st.integers(1, 16), ring_impl=st.sampled_from(IMPLS)))  # fmt: skip
def test_any_length_partitions_with_less_padding_than_one_step(layout):
    held = [p for rank in range(layout.ring_degree) for p in layout.slice_positions(rank)]
    assert sorted(held) == list(range(layout.padded_length))
    assert layout.length <= layout.padded_length < layout.length + 2 * layout.ring_degree * layout.ulysses_degree
    assert layout.chunk_length * layout.chunks_per_rank == layout.local_length * layout.ulysses_degree


@pytest.mark.parametrize("field", ["length", "ring_degree", "ulysses_degree"])
def test_zero_is_refused(field):
    with pytest.raises(ConfigError, match=f"^{field}=0 must be at least 1$"):
        SequenceLayout(**{"length": 8, field: 0})
