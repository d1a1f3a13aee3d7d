"""Merging partial results, held against fp64 attention over all keys at once."""

# Shapes: B batch, L queries, S keys, H heads, D head_dim.
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_ring.attention.merge import merge_
from ds_ring.attention.reference import reference_attention
from ds_ring.attention.spec import AttentionSpec

SPEC = AttentionSpec(scale=0.5)
Partial = tuple[Tensor, Tensor]

lses = st.one_of(st.sampled_from([-math.inf, math.inf, 0.0]), st.floats(width=32, allow_nan=False))
values = st.floats(-1e3, 1e3, width=32)


def keys_with_scores_around(level: float, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keys whose scaled scores against ``queries`` scatter around ``level``, and values."""
    k_BSHD = torch.randn(2, count, 3, 5, generator=generator, dtype=torch.float64)
    k_BSHD[..., -1] = level / SPEC.scale
    return k_BSHD, torch.randn(2, count, 3, 5, generator=generator, dtype=torch.float64)


def queries(generator: torch.Generator) -> Tensor:
    q_BLHD = torch.randn(2, 4, 3, 5, generator=generator, dtype=torch.float64)
    q_BLHD[..., -1] = 1.0
    return q_BLHD


def partial(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    out, lse = reference_attention(q, k, v, spec=SPEC, causal=False)
    return out.float(), lse.float()


def unseen(out: Tensor, lse: Tensor) -> Partial:
    return torch.zeros_like(out), torch.full_like(lse, -math.inf)


def one_row(out: float, lse: float) -> Partial:
    return torch.tensor([[[[out]]]], dtype=torch.float32), torch.tensor([[[lse]]], dtype=torch.float32)


def assert_merges_to_whole(levels: list[float], counts: list[int], order: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = queries(generator)
    blocks = [keys_with_scores_around(level, n, generator) for level, n in zip(levels, counts, strict=True)]
    out, lse = unseen(*partial(q, *blocks[0]))
    for i in order:
        merge_(out, lse, *partial(q, *blocks[i]))
    want_out, want_lse = reference_attention(
        q, torch.cat([k for k, _ in blocks], 1), torch.cat([v for _, v in blocks], 1), spec=SPEC, causal=False
    )
    torch.testing.assert_close(out.double(), want_out, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-6, rtol=1e-6)


@settings(max_examples=100)
@given(data=st.data(), counts=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_blocks_merged_in_any_order_are_attention_over_all_their_keys(data, counts, seed):
    order = data.draw(st.permutations(range(len(counts))))
    assert_merges_to_whole([0.0] * len(counts), counts, order, seed)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
@pytest.mark.parametrize("gap", [-1e4, -100.0, -20.0, 20.0, 100.0, 1e4])
def test_any_gap_between_two_sides_merges_exactly(gap, order):
    assert_merges_to_whole([0.0, gap], [6, 3], order, seed=1)


def test_error_does_not_grow_over_a_ring_of_sixty_four_blocks():
    assert_merges_to_whole([0.0] * 64, [4] * 64, list(range(64)), seed=2)


def test_a_block_that_sees_nothing_changes_nothing():
    out, lse = one_row(3.0, 1.5)
    merge_(out, lse, *one_row(0.0, -math.inf))
    assert (out.item(), lse.item()) == (3.0, 1.5)


def test_the_first_visible_block_replaces_a_side_that_saw_nothing():
    out, lse = one_row(0.0, -math.inf)
    merge_(out, lse, *one_row(3.0, 1.5))
    assert (out.item(), lse.item()) == (3.0, 1.5)


def test_two_sides_that_see_nothing_stay_zero_and_minus_infinity():
    out, lse = one_row(0.0, -math.inf)
    merge_(out, lse, *one_row(0.0, -math.inf))
    assert (out.item(), lse.item()) == (0.0, -math.inf)


@pytest.mark.parametrize("other", [-math.inf, -1e4, 0.0, 1e4])
def test_a_side_at_plus_infinity_wins(other):
    out, lse = one_row(3.0, math.inf)
    merge_(out, lse, *one_row(7.0, other))
    assert (out.item(), lse.item()) == (3.0, math.inf)
    out, lse = one_row(7.0, other)
    merge_(out, lse, *one_row(3.0, math.inf))
    assert (out.item(), lse.item()) == (3.0, math.inf)


@settings(max_examples=300)
@given(sides=st.lists(st.tuples(values, lses), min_size=2, max_size=5))
def test_merging_is_total_and_stays_between_the_values_it_merges(sides):
    (first, *rest) = sides
    out, lse = one_row(*first)
    for side in rest:
        merge_(out, lse, *one_row(*side))
    low, high = min(value for value, _ in sides), max(value for value, _ in sides)
    assert not math.isnan(lse.item())
    assert low - 1e-3 <= out.item() <= high + 1e-3
    # An lse is at least the largest one, and at most that plus the log of their number.
    top = max(lse for _, lse in sides)
    assert lse.item() >= top
    assert lse.item() <= top + math.log(len(sides)) + abs(top) * 1e-6 + 1e-6 or math.isinf(top)


def test_queries_are_merged_one_by_one():
    out = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    lse = torch.tensor([0.0, -math.inf, 0.0]).view(1, 1, 3)
    block_out = torch.tensor([3.0, 5.0, 0.0]).view(1, 3, 1, 1)
    block_lse = torch.tensor([0.0, 1.0, -math.inf]).view(1, 1, 3)
    merge_(out, lse, block_out, block_lse)
    assert out.flatten().tolist() == [2.0, 5.0, 3.0]
    torch.testing.assert_close(lse.flatten(), torch.tensor([math.log(2.0), 1.0, 0.0]))


def test_merging_into_some_of_the_queries_leaves_the_others():
    generator = torch.Generator().manual_seed(3)
    out, lse = torch.randn(2, 6, 3, 4, generator=generator), torch.randn(2, 3, 6, generator=generator)
    block_out, block_lse = torch.randn(2, 3, 3, 4, generator=generator), torch.randn(2, 3, 3, generator=generator)
    want_out, want_lse = out.clone(), lse.clone()
    part_out, part_lse = out[:, 3:].clone(), lse[:, :, 3:].clone()
    merge_(part_out, part_lse, block_out, block_lse)
    want_out[:, 3:], want_lse[:, :, 3:] = part_out, part_lse
    merge_(out[:, 3:], lse[:, :, 3:], block_out, block_lse)
    assert torch.equal(out, want_out)
    assert torch.equal(lse, want_lse)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_blocks_output_may_have_any_float_dtype(dtype):
    out, lse = one_row(1.0, 0.0)
    block_out, block_lse = one_row(3.0, 0.0)
    merge_(out, lse, block_out.to(dtype), block_lse)
    assert out.dtype == torch.float32
    assert out.item() == 2.0


@pytest.mark.parametrize("which", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_running_results_and_every_lse_must_be_fp32(which, dtype):
    arguments = [*one_row(1.0, 0.0), *one_row(2.0, 0.0)]
    arguments[which] = arguments[which].to(dtype)
    with pytest.raises(AssertionError):
        merge_(*arguments)
