"""One rank's block, and the reduction of any offset to the one alignment that kernels offer."""

# Shapes: B batch, L queries, S keys, H query heads, K key/value heads, D head_dim.
import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_ring.attention import block
from ds_ring.attention.backends import eager
from ds_ring.attention.backends.base import Aligned
from ds_ring.attention.reference import reference_attention
from ds_ring.attention.spec import AttentionSpec
from tests.helpers.random_blocks import SeenBlock, bottom_right

FP16_MAX = 65504.0


@dataclass(frozen=True)
class Case(SeenBlock):
    kv_heads: int = 2
    head_dim: int = 8

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return block.attend(q, k, v, spec=self.spec, causal=self.causal, q_offset=self.q_offset, k_offset=self.k_offset)

    def reference(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return reference_attention(
            q, k, v, spec=self.spec, causal=self.causal, q_offset=self.q_offset, k_offset=self.k_offset
        )


cases = st.builds(
    Case,
    batch=st.integers(1, 2),
    n_queries=st.integers(1, 40),
    n_keys=st.integers(1, 40),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.integers(4, 32),
    causal=st.booleans(),
    q_offset=st.integers(0, 60),
    k_offset=st.integers(0, 60),
    window=st.none() | st.integers(1, 50),
    softcap=st.none() | st.floats(0.5, 50.0),
    seed=st.integers(0, 1000),
)


def assert_is(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], tolerance: float = 2e-6) -> None:
    """``got`` has the contract's shape and dtype, no NaN, and the values of ``want``."""
    (out, lse), (want_out, want_lse) = got, want
    assert out.shape == want_out.shape
    assert lse.dtype == torch.float32
    assert torch.isfinite(out).all()
    assert torch.equal(lse == -math.inf, want_lse == -math.inf)
    torch.testing.assert_close(out.double(), want_out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse, atol=5e-6, rtol=1e-6)


@settings(max_examples=200)
@given(case=cases)
def test_a_block_is_reference_attention(case):
    tensors = case.tensors()
    assert_is(case.attend(*tensors), case.reference(*tensors))


@settings(max_examples=60)
@given(case=cases, limit=st.integers(1, 300))
def test_groups_of_queries_under_a_score_limit_change_nothing(case, limit):
    tensors = case.tensors()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "SCORES_LIMIT", limit)
        assert_is(case.attend(*tensors), case.reference(*tensors))


def test_a_score_limit_bounds_the_scores_held_at_a_time(monkeypatch):
    case = Case(n_queries=40, n_keys=10)
    held = []
    rows = eager._rows
    monkeypatch.setattr(eager, "_rows", lambda q, *rest: held.append(q.shape[1]) or rows(q, *rest))
    monkeypatch.setattr(eager, "SCORES_LIMIT", 4 * 10 * 6)  # heads x keys x 6 queries
    case.attend(*case.tensors())
    assert held == [6, 6, 6, 6, 6, 6, 4]


@pytest.mark.parametrize("limit", [1, eager.SCORES_LIMIT])
def test_queries_that_see_no_key_give_zero_and_minus_infinity(monkeypatch, limit):
    monkeypatch.setattr(eager, "SCORES_LIMIT", limit)
    case = Case(n_queries=6, n_keys=3, q_offset=10, k_offset=12)
    out, lse = case.attend(*case.tensors())
    assert torch.equal(out[:, :2], torch.zeros_like(out[:, :2]))
    assert (lse[:, :, :2] == -math.inf).all()
    assert torch.isfinite(lse[:, :, 2:]).all()
    assert (out[:, 2:] != 0).all()


@pytest.mark.parametrize("window", [None, 2])
def test_a_block_that_no_query_sees_gives_zero_and_minus_infinity(window):
    case = Case(q_offset=0, k_offset=100, window=window)
    out, lse = case.attend(*case.tensors())
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_a_block_before_the_window_gives_zero_and_minus_infinity():
    case = Case(q_offset=100, k_offset=0, window=5)
    out, lse = case.attend(*case.tensors())
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_a_query_sees_itself_and_the_keys_before_it_inside_its_window():
    q, k = torch.zeros(1, 5, 1, 4), torch.zeros(1, 5, 1, 4)
    v = torch.arange(5.0).view(1, 5, 1, 1).expand(1, 5, 1, 4).contiguous()
    out, lse = block.attend(q, k, v, spec=AttentionSpec(1.0, window=3))
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0]))
    torch.testing.assert_close(lse[0, 0].exp(), torch.tensor([1.0, 2.0, 3.0, 3.0, 3.0]))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("group", [1, 3])
def test_slices_of_a_fused_projection_and_transposed_heads_are_taken_as_they_are(causal, group):
    case = Case(batch=2, n_queries=11, n_keys=11, group=group, causal=causal)
    q, k, v = case.tensors()
    fused = torch.cat((q, k, v), dim=2).split([q.shape[2], k.shape[2], v.shape[2]], dim=2)
    transposed = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert not any(t.is_contiguous() for t in (*fused, *transposed))
    for strided in (fused, transposed):
        assert_is(case.attend(*strided), case.reference(q, k, v))


@settings(max_examples=40)
@given(case=cases)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_half_precision_loses_no_more_than_the_rounding_of_its_output(dtype, tolerance, case):
    tensors = case.tensors(dtype)
    out, lse = case.attend(*tensors)
    assert out.dtype == dtype
    assert_is((out, lse), case.reference(*tensors), tolerance)


@pytest.mark.parametrize("causal", [True, False])
def test_fp16_scores_beyond_its_largest_number_stay_finite(causal):
    case = Case(n_queries=24, n_keys=24, head_dim=32, causal=causal)
    q, k, v = case.tensors(torch.float16, scale=300.0)
    scores = torch.einsum("blhd,bshd->bhls", q.double(), k.double().repeat_interleave(2, 2)) * case.spec.scale
    assert scores.abs().max() > FP16_MAX
    out, lse = case.attend(q, k, v)
    want_out, want_lse = case.reference(q, k, v)
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()
    torch.testing.assert_close(out.double(), want_out, atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-2, rtol=1e-6)


def through(monkeypatch, kernel) -> None:
    """Blocks go to ``kernel``."""
    monkeypatch.setattr(block, "select_backend", lambda q, n_keys, block: Aligned(kernel.__name__, kernel))


@pytest.mark.parametrize("n_keys", [1, 2, 5, 8])
@pytest.mark.parametrize("n_queries", [1, 2, 5, 8])
def test_every_offset_reduces_to_the_alignment_that_kernels_offer(monkeypatch, n_queries, n_keys):
    through(monkeypatch, bottom_right)
    for shift in range(-n_queries - 2, n_keys + 3):
        case = Case(n_queries=n_queries, n_keys=n_keys, q_offset=20 + shift, k_offset=20)
        tensors = case.tensors()
        assert_is(case.attend(*tensors), case.reference(*tensors))


def test_a_full_block_goes_to_the_kernel_as_it_is(monkeypatch):
    calls = []

    def kernel(q, k, v, *, scale, causal):
        calls.append((q.shape[1], k.shape[1], causal))
        return bottom_right(q, k, v, scale=scale, causal=causal)

    through(monkeypatch, kernel)
    for case in (Case(causal=False), Case(n_keys=7), Case(q_offset=9)):
        tensors = case.tensors()
        assert_is(case.attend(*tensors), case.reference(*tensors))
    assert calls == [(7, 9, False), (7, 7, True), (7, 9, False)]


@pytest.mark.parametrize("kernel", [None, bottom_right], ids=["eager", "kernel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_may_be_asked_for_in_fp32(monkeypatch, kernel, dtype):
    if kernel:
        through(monkeypatch, kernel)
    for case in (Case(), Case(n_keys=7), Case(n_queries=9, n_keys=7), Case(causal=False)):
        tensors = case.tensors(dtype)
        out, lse = block.attend(
            *tensors, spec=case.spec, causal=case.causal, q_offset=case.q_offset, out_dtype=torch.float32
        )
        assert out.dtype == torch.float32
        assert_is((out, lse), case.reference(*tensors), 4e-3 if kernel and dtype != torch.float32 else 2e-6)


@settings(max_examples=60)
@given(case=cases, cut=st.integers(0, 40))
def test_blocks_folded_into_a_running_result_are_attention_over_all_their_keys(case, cut):
    q, k, v = case.tensors()
    cut = min(cut, case.n_keys)
    out, lse = torch.zeros_like(q), torch.full((case.batch, q.shape[2], case.n_queries), -math.inf)
    for keys in (slice(0, cut), slice(cut, case.n_keys)):
        block.accumulate_(
            out, lse, q, k[:, keys], v[:, keys],
            spec=case.spec, causal=case.causal, q_offset=case.q_offset, k_offset=case.k_offset + keys.start,
        )  # fmt: skip
    assert_is((out, lse), case.reference(q, k, v), 4e-6)


@pytest.mark.parametrize("kernel", [None, bottom_right], ids=["eager", "kernel"])
def test_folding_into_some_of_the_queries_leaves_the_others(monkeypatch, kernel):
    if kernel:
        through(monkeypatch, kernel)
    case = Case(batch=2, n_queries=8)
    q, k, v = case.tensors()
    out, lse = block.attend(q, k, v, spec=case.spec, causal=False)
    before = out.clone(), lse.clone()
    block.accumulate_(out[:, 3:6], lse[:, :, 3:6], q[:, 3:6], k, v, spec=case.spec, causal=False)
    for queries in (slice(0, 3), slice(6, 8)):
        assert torch.equal(out[:, queries], before[0][:, queries])
        assert torch.equal(lse[:, :, queries], before[1][:, :, queries])
    # The same keys once more: the same average, twice the weight.
    torch.testing.assert_close(out, before[0])
    torch.testing.assert_close(lse[:, :, 3:6], before[1][:, :, 3:6] + math.log(2))


class TestReference:
    """The yardstick itself, by hand."""

    def test_one_key_gives_its_value_and_its_score(self):
        q, k, v = torch.full((1, 1, 1, 4), 2.0), torch.full((1, 1, 1, 4), 3.0), torch.arange(4.0).view(1, 1, 1, 4)
        out, lse = reference_attention(q, k, v, spec=AttentionSpec(0.5))
        assert torch.equal(out, v.double())
        assert lse.item() == 12.0
        assert reference_attention(q, k, v, spec=AttentionSpec(0.5, softcap=6.0))[1].item() == 6.0 * math.tanh(2.0)

    @pytest.mark.parametrize("window", [None, 4])
    def test_it_is_pytorchs_own_attention(self, window):
        case = Case(batch=2, n_queries=13, n_keys=13, group=3, window=window)
        q, k, v = (t.double() for t in case.tensors())
        distance = torch.arange(13)[:, None] - torch.arange(13)[None]
        mask = (distance >= 0) & (distance < (window or 13))
        want = torch.nn.functional.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask, enable_gqa=True
        ).transpose(1, 2)
        torch.testing.assert_close(case.reference(q, k, v)[0], want, atol=1e-12, rtol=1e-12)

    def test_only_the_difference_of_the_offsets_counts(self):
        case = Case(q_offset=5, k_offset=3)
        tensors = case.tensors()
        moved = replace(case, q_offset=1005, k_offset=1003)
        for got, want in zip(moved.reference(*tensors), case.reference(*tensors), strict=True):
            assert torch.equal(got, want)
