"""The Triton kernel, run by Triton's interpreter on CPU tensors: its numbers, not its speed on any GPU."""

import math
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_ring.attention.backends import eager
from ds_ring.attention.merge import merge_
from ds_ring.kernels import triton_attention, triton_attention_kernel, triton_attention_tiles
from tests.helpers.triton_cases import Case, assert_is, cases
from tests.helpers.triton_interpreter import INTERPRETED

pytestmark = INTERPRETED
NAN = float("nan")


@pytest.fixture
def poisoned_outputs(monkeypatch):
    """Outputs hold NaN wherever the kernel leaves them unwritten."""
    outputs = triton_attention._outputs
    monkeypatch.setattr(triton_attention, "_outputs", lambda *args: tuple(t.fill_(NAN) for t in outputs(*args)))


@settings(max_examples=25)
@given(case=cases)
def test_a_block_is_reference_attention(case):
    tensors = case.tensors()
    assert_is(case.attend(*tensors), case.reference(*tensors), softcap=case.softcap)


@settings(max_examples=15)
@given(case=cases, far=st.sampled_from([-(1 << 40), -1000, 1000, 1 << 40]), window=st.sampled_from([None, 5, 1 << 41]))
def test_it_agrees_with_the_eager_path_at_any_distance(case, far, window):
    case = replace(case, q_offset=case.q_offset + far, window=window)
    q, k, v = case.tensors()
    shift = case.q_offset - case.k_offset
    want = eager.attention(q, k, v, spec=case.spec, causal=case.causal, shift=shift)
    assert_is(case.attend(q, k, v), want, softcap=case.softcap)


@settings(max_examples=8)
@given(case=cases)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)], ids=str)
def test_half_precision_loses_no_more_than_the_rounding_of_weights_and_output(dtype, tolerance, case):
    tensors = case.tensors(dtype)
    out, lse = case.attend(*tensors)
    assert out.dtype == dtype
    assert_is((out, lse), case.reference(*tensors), tolerance, case.softcap)


@settings(max_examples=10)
@given(case=cases, cuts=st.lists(st.integers(1, 40), min_size=1, max_size=4), ahead=st.integers(-20, 80))
def test_state_carried_over_blocks_gives_attention_over_all_of_them(case, cuts, ahead):
    case = replace(case, n_keys=sum(cuts), q_offset=ahead, k_offset=0)
    q, k, v = case.tensors()
    state = None
    for start, stop in reversed(list(pairwise(accumulate(cuts, initial=0)))):
        state = replace(case, k_offset=start).attend(q, k[:, start:stop], v[:, start:stop], previous=state)
    assert_is(state, case.reference(q, k, v), 1e-5, case.softcap)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("window", [None, 1, 16, 20, 33])
@pytest.mark.parametrize(("n_queries", "n_keys", "shift"), [(33, 33, 0), (1, 50, 49), (48, 16, -20), (20, 64, 40)])
def test_edges_of_tiles_and_windows(n_queries, n_keys, shift, window):
    case = Case(n_queries=n_queries, n_keys=n_keys, group=1, q_offset=shift, window=window)
    tensors = case.tensors()
    assert_is(case.attend(*tensors), case.reference(*tensors), softcap=case.softcap)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("head_dim", [1, 5, 80, 96, 112, 192, 300])
@pytest.mark.parametrize(("kv_heads", "group"), [(3, 3), (1, 4)])
def test_head_sizes_and_groups_of_heads(head_dim, kv_heads, group):
    case = Case(n_queries=19, n_keys=19, head_dim=head_dim, kv_heads=kv_heads, group=group)
    tensors = case.tensors()
    assert_is(case.attend(*tensors), case.reference(*tensors), softcap=case.softcap)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("previous", [True, False])
@pytest.mark.parametrize(
    "config",
    [(16, 16, 2, False), (32, 16, 1, True), (16, 32, 2, True), (64, 64, 1, False)],
    ids=lambda config: "x".join(map(str, config)),
)
def test_every_kind_of_tile(monkeypatch, config, previous, causal):
    block_m, block_n, v_split, use_tma = config
    tile = triton_attention_tiles.config(block_m, block_n, 4, 2, v_split, use_tma)
    monkeypatch.setattr(triton_attention_kernel, "INTERPRETER_CONFIG", tile)
    case = Case(n_keys=90, head_dim=40, causal=causal, q_offset=45, window=30 if causal else None)
    q, k, v = case.tensors()
    if previous:
        first = replace(case, k_offset=48).attend(q, k[:, 48:], v[:, 48:])
        got = case.attend(q, k[:, :48], v[:, :48], previous=first)
    else:
        got = case.attend(q, k, v)
    assert_is(got, case.reference(q, k, v), 1e-5)


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_only_blocks_of_keys_that_a_tile_sees_are_read(softcap):
    """Poison in all other blocks would reach the output: weights of 0 times NaN."""
    case = Case(n_queries=32, n_keys=160, group=1, q_offset=96, window=20, softcap=softcap)
    q, k, v = case.tensors()
    want = case.reference(q, k, v)
    for tensor in (k, v):
        tensor[:, :64] = NAN  # the first query sees keys 77 .. 96: blocks of 16 from 64 on
        tensor[:, 128:] = NAN
    assert_is(case.attend(q, k, v), want)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("previous_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    [
        Case(n_queries=6, n_keys=3, q_offset=10, k_offset=12),  # the first two see nothing
        Case(q_offset=0, k_offset=100),
        Case(q_offset=100, k_offset=0, window=5),
        Case(window=0),
        Case(n_keys=0),
        Case(n_keys=0, causal=False),
    ],
)
def test_queries_that_see_no_key_keep_what_they_have(case, previous_dtype):
    q, k, v = case.tensors()
    if previous_dtype is None:
        out, lse = case.attend(q, k, v)
        assert_is((out, lse), case.reference(q, k, v))
        blind = lse == -math.inf
        assert blind[:, :, :2].all()
        assert not out.transpose(1, 2)[blind].any()
        return
    before = torch.randn(q.shape).to(previous_dtype), torch.randn(1, 2, q.shape[1])
    before[0][:, 1] = NAN
    before[1][:, :, 1] = -math.inf
    out, lse = case.attend(q, k, v, previous=before, out_dtype=torch.float32)
    assert torch.equal(out[:, 0], before[0][:, 0].float())
    assert not out[:, 1].any()
    torch.testing.assert_close(lse[:, :, :2], before[1][:, :, :2], atol=0.0, rtol=1e-6)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (1, 0, 2, 8)])
def test_no_queries_give_no_output(shape):
    q, k = torch.zeros(shape), torch.zeros(shape[0], 5, 2, 8)
    out, lse = triton_attention.attention(q, k, k, scale=1.0, causal=True, q_offset=0, k_offset=0)
    assert out.shape == shape
    assert lse.shape == (shape[0], 2, shape[1])


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_whatever_a_previous_out_holds_where_nothing_was_seen_does_not_matter(dtype):
    case = Case(n_queries=20, n_keys=20, k_offset=-4)
    q, k, v = case.tensors()
    before = torch.full(q.shape, NAN, dtype=dtype), torch.full((1, 2, 20), -math.inf)
    out, lse = case.attend(q, k, v, previous=before, out_dtype=torch.float32)
    assert_is((out, lse), case.reference(q, k, v))


@settings(max_examples=8)
@given(case=cases, seen=st.integers(0, 40))
def test_a_previous_result_is_merged_and_not_changed(case, seen):
    q, k, v = case.tensors()
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(q.shape, generator=generator), 3 * torch.randn(q.shape[0], q.shape[2], q.shape[1])
    before[1][:, :, seen:] = -math.inf
    before[0][:, seen:] = 0.0
    copies = [t.clone() for t in before]
    got = case.attend(q, k, v, previous=before)
    assert all(torch.equal(a, b) for a, b in zip(before, copies, strict=True))
    merge_(*before, *case.attend(q, k, v))
    assert_is(got, before, 1e-5)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("causal", [True, False])
def test_fp16_scores_beyond_its_largest_number_stay_finite(causal, softcap):
    case = Case(n_queries=24, n_keys=24, head_dim=32, causal=causal, softcap=softcap)
    q, k, v = case.tensors(torch.float16, scale=300.0)
    assert torch.einsum("blhd,bshd->bhls", q.double(), k.double().repeat_interleave(2, 2)).abs().max() > 65504
    out, lse = case.attend(q, k, v)
    want_out, want_lse = case.reference(q, k, v)
    torch.testing.assert_close(out.double(), want_out, atol=1.0, rtol=2e-3)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-2, rtol=1e-6)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_nan_reaches_the_queries_that_see_it(softcap):
    case = Case(n_queries=40, n_keys=40, group=1, softcap=softcap)
    for poisoned in range(3):
        tensors = case.tensors()
        tensors[poisoned][0, 20] = NAN
        out, lse = case.attend(*tensors)
        wrong = torch.isnan(out).any(3)[0, :, 0]
        assert wrong[20 if poisoned == 0 else slice(20, None)].all()
        assert not wrong[:16].any()  # other tiles
        assert torch.equal(torch.isnan(lse)[0, 0], torch.isnan(case.reference(*tensors)[1])[0, 0])
    before = torch.zeros(1, 40, 1, 16), torch.zeros(1, 1, 40)
    before[1][0, 0, 3] = NAN
    assert torch.isnan(case.attend(*case.tensors(), previous=before)[1])[0, 0].nonzero().tolist() == [[3]]


def test_repeats_are_bit_equal():
    case = Case(window=20, softcap=10.0)
    q, k, v = case.tensors(torch.float16)
    first = case.attend(q, k, v)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(case.attend(q, k, v), first, strict=True))
