"""Ring x Ulysses attention in a world of threads, held against fp64 attention over the whole sequence."""

# Shapes: B batch, L tokens of the sequence, H query heads, K key/value heads, D head_dim.
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_ring.attention import ring
from ds_ring.attention.ulysses import bytes_sent, kv_heads_of
from ds_ring.parallel.layout import SequenceLayout
from tests.helpers.attention_problems import Problem, run_attention

SPLITS = [(ring, ranks // ring) for ranks in (2, 3, 4, 6, 8, 16) for ring in range(1, ranks + 1) if ranks % ring == 0]
IMPLS = ("zigzag", "contiguous")
VARIANTS = ("pass_kv", "gather_kv")
EXACT = 1e-6
WRONG = 1e-2


def error(problem: Problem, layout: SequenceLayout, **options) -> float:
    return problem.error(run_attention(problem, layout, **options).out_BLHD)


def name(split: tuple[int, int]) -> str:
    return f"ring{split[0]}_ulysses{split[1]}"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ring_impl", IMPLS)
@pytest.mark.parametrize("split", SPLITS, ids=name)
def test_every_split_is_attention_over_the_whole_sequence(split, ring_impl, variant):
    problem = Problem(63, heads=48, kv_heads=48, batch=2)
    assert error(problem, SequenceLayout(63, *split, ring_impl), variant=variant) < EXACT


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ring_impl", IMPLS)
@pytest.mark.parametrize("split", [(2, 1), (3, 1), (1, 4), (2, 2), (3, 2), (8, 1), (4, 4), (16, 1)], ids=name)
def test_a_length_that_divides_by_nothing(split, ring_impl, variant):
    problem = Problem(1001, heads=4, kv_heads=2)
    assert error(problem, SequenceLayout(1001, *split, ring_impl), variant=variant) < EXACT


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ring_impl", IMPLS)
@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("split", [(2, 1), (2, 2), (3, 2), (1, 6), (16, 1), (4, 4)], ids=name)
def test_fewer_tokens_than_ranks(split, length, ring_impl, variant):
    problem = Problem(length, heads=12, kv_heads=12)
    assert error(problem, SequenceLayout(length, *split, ring_impl), variant=variant) < EXACT


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "split"),
    [
        (8, 8, (2, 4)),
        (8, 2, (2, 2)),
        (8, 2, (2, 4)),
        (8, 2, (2, 8)),
        (8, 1, (2, 4)),
        (8, 1, (4, 1)),
        (9, 3, (3, 3)),
        (9, 3, (2, 9)),
        (12, 6, (2, 4)),
        (12, 4, (2, 6)),
        (15, 3, (2, 5)),
        (28, 4, (1, 7)),
        (28, 4, (1, 14)),
    ],
    ids=str,
)
def test_grouped_and_multi_query_heads(heads, kv_heads, split, variant):
    problem = Problem(50, heads=heads, kv_heads=kv_heads)
    assert error(problem, SequenceLayout(50, *split), variant=variant) < EXACT


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ring_impl", IMPLS)
@pytest.mark.parametrize("window", [1, 3, 16, 40, 1000])
@pytest.mark.parametrize("split", [(1, 2), (2, 1), (3, 2), (8, 1)], ids=name)
def test_sliding_windows(split, window, ring_impl, variant):
    problem = Problem(63, heads=4, kv_heads=2, window=window)
    assert error(problem, SequenceLayout(63, *split, ring_impl), variant=variant) < EXACT


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("split", [(1, 2), (4, 1), (3, 2)], ids=name)
def test_softcap(split, window, variant):
    problem = Problem(63, heads=4, kv_heads=2, window=window, softcap=0.5)
    result = run_attention(problem, SequenceLayout(63, *split), variant=variant)
    assert problem.error(result.out_BLHD) < EXACT
    assert replace(problem, softcap=None).error(result.out_BLHD) > WRONG


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ring_impl", IMPLS)
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("split", [(1, 1), (1, 2), (4, 1), (3, 2), (2, 4)], ids=name)
def test_attention_sinks(split, window, ring_impl, variant):
    problem = Problem(63, heads=8, kv_heads=2, window=window, with_sinks=True)
    result = run_attention(problem, SequenceLayout(63, *split, ring_impl), variant=variant)
    assert problem.error(result.out_BLHD) < EXACT
    assert replace(problem, with_sinks=False).error(result.out_BLHD) > WRONG


@settings(max_examples=40)
@given(
    length=st.integers(1, 90),
    ring_degree=st.integers(1, 5),
    ulysses_degree=st.integers(1, 4),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 3),
    window=st.none() | st.integers(1, 60),
    ring_impl=st.sampled_from(IMPLS),
    variant=st.sampled_from(VARIANTS),
    with_sinks=st.booleans(),
    batch=st.integers(1, 2),
    seed=st.integers(0, 100),
)
def test_any_shape(
    length, ring_degree, ulysses_degree, kv_heads, group, window, ring_impl, variant, with_sinks, batch, seed
):
    heads = math.lcm(kv_heads * group, ulysses_degree)
    problem = Problem(length, heads, kv_heads, batch=batch, window=window, with_sinks=with_sinks, seed=seed)
    layout = SequenceLayout(length, ring_degree, ulysses_degree, ring_impl)
    assert error(problem, layout, variant=variant) < EXACT


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("split", [(3, 1), (1, 3), (3, 3)], ids=name)
def test_tensors_with_heads_before_tokens_in_memory_are_taken_as_they_are(split, variant):
    problem = Problem(40, heads=6, kv_heads=3, batch=2)
    result = run_attention(
        problem,
        SequenceLayout(40, *split),
        variant=variant,
        view=lambda x_BTHD: x_BTHD.transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert problem.error(result.out_BLHD) < EXACT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_is_rounded_once_however_long_the_ring(variant, dtype):
    problem = Problem(256, heads=2, kv_heads=2, dtype=dtype)
    alone = error(problem, SequenceLayout(256))
    assert alone < torch.finfo(dtype).eps
    # The result is rounded to the dtype once; sixteen roundings of a running result would give several times as much.
    assert error(problem, SequenceLayout(256, 16), variant=variant) < 1.6 * alone


class TestAuto:
    """``auto`` gathers K/V as long as they fit."""

    @pytest.fixture
    def taken(self, monkeypatch) -> list[str]:
        taken: list[str] = []
        for variant in VARIANTS:
            run = getattr(ring, variant)
            monkeypatch.setattr(
                ring, variant, lambda *args, _run=run, _name=variant, **kw: taken.append(_name) or _run(*args, **kw)
            )
        return taken

    @pytest.mark.parametrize(("spare", "variant"), [(0, "gather_kv"), (-1, "pass_kv")])
    def test_it_gathers_up_to_the_limit(self, taken, spare, variant):
        problem = Problem(64, heads=4, kv_heads=2, batch=2)
        kv_bytes = 2 * 2 * 64 * 2 * 4 * 4  # K and V, batch, tokens, heads, head_dim, fp32
        result = run_attention(problem, SequenceLayout(64, 4), gather_limit_bytes=kv_bytes + spare)
        assert problem.error(result.out_BLHD) < EXACT
        assert taken == [variant] * 4

    @pytest.mark.parametrize(("spare", "gathers"), [(0, 0), (-1, 2)])
    def test_a_ring_of_two_waits_for_its_other_rank_only_to_save_a_large_result(
        self, taken, spare, gathers, monkeypatch
    ):
        """K and V of both exceed the limit either way."""
        monkeypatch.setattr(ring, "takes_segments", lambda *_: True)
        problem = Problem(64, heads=4, kv_heads=4)
        result_bytes = 32 * 4 * 4 * 4  # a rank's tokens, heads, head_dim, fp32
        result = run_attention(problem, SequenceLayout(64, 2), gather_limit_bytes=result_bytes + spare)
        assert problem.error(result.out_BLHD) < EXACT
        assert (taken.count("pass_kv"), taken.count("gather_kv")) == (2, gathers)

    def test_one_ring_rank_needs_neither(self, taken):
        problem = Problem(64, heads=4, kv_heads=2)
        assert error(problem, SequenceLayout(64, 1, 4)) < EXACT
        assert taken == []


def ulysses_kv_heads(heads: int, kv_heads: int, degree: int) -> int:
    """Key/value heads that a Ulysses rank is sent."""
    if kv_heads % degree == 0:
        return kv_heads // degree
    return 1 if degree % kv_heads == 0 else heads // degree


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ring_impl", IMPLS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "split"),
    [
        (4, 4, (2, 1)), (4, 2, (3, 1)), (4, 1, (8, 1)), (2, 2, (16, 1)),
        (4, 4, (1, 2)), (8, 2, (1, 8)), (12, 6, (1, 4)),
        (4, 4, (2, 2)), (8, 2, (3, 4)), (12, 6, (2, 4)), (9, 3, (3, 3)), (8, 1, (4, 4)),
    ],
    ids=str,
)  # fmt: skip
def test_every_rank_sends_the_bytes_of_the_closed_form(heads, kv_heads, split, ring_impl, variant):
    R, U = split
    batch, head_dim, itemsize = 2, 4, 4
    problem = Problem(97, heads, kv_heads, head_dim, batch)
    layout = SequenceLayout(97, R, U, ring_impl)
    result = run_attention(problem, layout, variant=variant)

    head = batch * head_dim * itemsize  # one head of one token
    kv = ulysses_kv_heads(heads, kv_heads, U)
    # q and out of all heads, k and v of every rank's share of heads; 1/U of each stays at home.
    all_to_all = head * (layout.padded_length // (R * U)) * (2 * heads + 2 * kv * U) * (U - 1) // U
    chunks = R * (2 if ring_impl == "zigzag" and R > 1 else 1)
    for rank, traffic in enumerate(result.traffic):
        r = rank // U
        # Zigzag: chunk r goes to all others, chunk 2R-1-r only to ranks before r. Contiguous: to ranks after r.
        sent_chunks = (R - 1 + r) if ring_impl == "zigzag" else (R - 1 - r)
        exchange = sent_chunks * (layout.padded_length // chunks) * head * kv * 2
        assert traffic.bytes_by_op["exchange"] == exchange
        assert traffic.bytes_by_op["all_to_all"] == all_to_all
        assert traffic.bytes_sent == exchange + all_to_all
    q_shape = torch.Size((batch, layout.local_length, heads, head_dim))
    assert bytes_sent(q_shape, kv_heads, U, itemsize) == all_to_all


def test_a_zigzag_ring_sends_three_quarters_of_what_passing_on_every_block_would():
    problem = Problem(64, heads=2, kv_heads=2)
    R = 4
    total = sum(t.bytes_sent for t in run_attention(problem, SequenceLayout(64, R)).traffic)
    everything = (R - 1) * 2 * 64 * 2 * 4 * 4  # every rank's K and V to all the others
    assert total == everything * 3 // 4


class TestKvHeadsOfAUlyssesRank:
    @pytest.mark.parametrize(
        ("heads", "kv_heads", "degree", "want"),
        [
            (8, 8, 4, [[0, 1], [2, 3], [4, 5], [6, 7]]),
            (8, 4, 2, [[0, 1], [2, 3]]),
            (8, 2, 4, [[0], [0], [1], [1]]),
            (8, 1, 4, [[0], [0], [0], [0]]),
            (9, 3, 3, [[0], [1], [2]]),
            (12, 6, 4, [[0, 0, 1], [1, 2, 2], [3, 3, 4], [4, 5, 5]]),
        ],
    )
    def test_by_hand(self, heads, kv_heads, degree, want):
        assert [kv_heads_of(u, heads, kv_heads, degree) for u in range(degree)] == want

    @pytest.mark.parametrize("degree", [1, 2, 3, 4, 6, 8, 12, 24])
    @pytest.mark.parametrize("kv_heads", [1, 2, 3, 4, 6, 8, 12, 24])
    def test_grouped_query_attention_on_a_share_meets_the_heads_of_the_whole(self, kv_heads, degree):
        heads = 24
        share, group = heads // degree, heads // kv_heads
        counts = set()
        for u in range(degree):
            held = kv_heads_of(u, heads, kv_heads, degree)
            counts.add(len(held))
            assert share % len(held) == 0
            for i in range(share):
                assert held[i // (share // len(held))] == (u * share + i) // group
        assert len(counts) == 1, "an all-to-all needs equal parts"


class TestMistakesShow:
    """The tolerance above would not hide a wrong order: each of these is far off."""

    PROBLEM = Problem(64, heads=4, kv_heads=4)
    ZIGZAG, CONTIGUOUS = SequenceLayout(64, 4), SequenceLayout(64, 4, 1, "contiguous")

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_zigzag_order_not_undone(self, variant):
        assert error(self.PROBLEM, self.ZIGZAG, variant=variant, put_together_by=self.CONTIGUOUS) > WRONG

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_contiguous_attention_over_zigzag_tokens(self, variant):
        wrong = {"cut_by": self.ZIGZAG, "put_together_by": self.ZIGZAG}
        assert error(self.PROBLEM, self.CONTIGUOUS, variant=variant, **wrong) > WRONG

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_zigzag_attention_over_contiguous_tokens(self, variant):
        wrong = {"cut_by": self.CONTIGUOUS, "put_together_by": self.CONTIGUOUS}
        assert error(self.PROBLEM, self.ZIGZAG, variant=variant, **wrong) > WRONG

    def test_ulysses_parts_of_another_split(self):
        layout = SequenceLayout(64, 2, 2)
        assert error(self.PROBLEM, layout, cut_by=SequenceLayout(64, 2, 2, "contiguous")) > WRONG
