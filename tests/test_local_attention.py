"""One rank's block, and the reduction of any offset to the one alignment that kernels offer."""

# Shapes: B batch, L queries, S keys, H query heads, K key/value heads, D head_dim.
import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_ring.attention import local, plain
from ds_ring.attention.reference import reference_attention
from ds_ring.attention.spec import AttentionSpec

FP16_MAX = 65504.0
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A random block and how it is seen."""

    batch: int = 1
    n_queries: int = 7
    n_keys: int = 9
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 8
    causal: bool = True
    q_offset: int = 0
    k_offset: int = 0
    window: int | None = None
    softcap: float | None = None
    seed: int = 0

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(self.head_dim**-0.5, self.window, self.softcap)

    def tensors(self, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        q, k, v = (
            (scale * torch.randn(self.batch, length, heads, self.head_dim, generator=generator)).to(dtype)
            for length, heads in (
                (self.n_queries, self.kv_heads * self.group),
                (self.n_keys, self.kv_heads),
                (self.n_keys, self.kv_heads),
            )
        )
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return local.attend(q, k, v, spec=self.spec, causal=self.causal, q_offset=self.q_offset, k_offset=self.k_offset)

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


@settings(max_examples=200, deadline=None)
@given(case=cases)
def test_a_block_is_reference_attention(case):
    tensors = case.tensors()
    assert_is(case.attend(*tensors), case.reference(*tensors))


@settings(max_examples=60, deadline=None)
@given(case=cases, limit=st.integers(1, 300))
def test_groups_of_queries_under_a_score_limit_change_nothing(case, limit):
    tensors = case.tensors()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "SCORES_LIMIT", limit)
        assert_is(case.attend(*tensors), case.reference(*tensors))


def test_a_score_limit_bounds_the_scores_held_at_a_time(monkeypatch):
    case = Case(n_queries=40, n_keys=10)
    held = []
    rows = plain._rows
    monkeypatch.setattr(plain, "_rows", lambda q, *rest: held.append(q.shape[1]) or rows(q, *rest))
    monkeypatch.setattr(plain, "SCORES_LIMIT", 4 * 10 * 6)  # heads x keys x 6 queries
    case.attend(*case.tensors())
    assert held == [6, 6, 6, 6, 6, 6, 4]


@pytest.mark.parametrize("limit", [1, plain.SCORES_LIMIT])
def test_rows_that_see_no_key_give_zero_and_minus_infinity(monkeypatch, limit):
    monkeypatch.setattr(plain, "SCORES_LIMIT", limit)
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


def test_a_block_behind_the_window_gives_zero_and_minus_infinity():
    case = Case(q_offset=100, k_offset=0, window=5)
    out, lse = case.attend(*case.tensors())
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_a_query_sees_itself_and_the_keys_before_it_inside_its_window():
    q, k = torch.zeros(1, 5, 1, 4), torch.zeros(1, 5, 1, 4)
    v = torch.arange(5.0).view(1, 5, 1, 1).expand(1, 5, 1, 4).contiguous()
    out, lse = local.attend(q, k, v, spec=AttentionSpec(1.0, window=3))
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


@settings(max_examples=40, deadline=None)
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


def bottom_right(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """What kernels offer: the last query sees the last key, and only blocks in which every query sees some key."""
    n_queries, n_keys = q.shape[1], k.shape[1]
    assert n_queries > 0
    assert n_keys > 0
    assert not causal or n_queries <= n_keys, "the first queries would see nothing"
    out, lse = reference_attention(q, k, v, spec=AttentionSpec(scale), causal=causal, q_offset=n_keys - n_queries)
    return out.to(q.dtype), lse.float()


def top_left(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = reference_attention(q, k, v, spec=AttentionSpec(scale), causal=causal)
    return out.to(q.dtype), lse.float()


def base_two(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = bottom_right(q, k, v, scale=scale, causal=causal)
    return out, lse / math.log(2)


def rows_before_heads(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = bottom_right(q, k, v, scale=scale, causal=causal)
    return out, lse.transpose(1, 2)


def lse_of_unscaled_scores(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    return bottom_right(q, k, v, scale=scale, causal=causal)[0], bottom_right(q, k, v, scale=1.0, causal=causal)[1]


def half_precision_lse(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = bottom_right(q, k, v, scale=scale, causal=causal)
    return out, lse.half()


@pytest.mark.parametrize("n_keys", [1, 2, 5, 8])
@pytest.mark.parametrize("n_queries", [1, 2, 5, 8])
def test_every_offset_reduces_to_the_alignment_that_kernels_offer(monkeypatch, n_queries, n_keys):
    monkeypatch.setattr(local, "choose_backend", lambda q, spec: bottom_right)
    for shift in range(-n_queries - 2, n_keys + 3):
        case = Case(n_queries=n_queries, n_keys=n_keys, q_offset=20 + shift, k_offset=20)
        tensors = case.tensors()
        assert_is(case.attend(*tensors), case.reference(*tensors))


def test_a_full_block_goes_to_the_kernel_as_it_is(monkeypatch):
    calls = []

    def backend(q, k, v, *, scale, causal):
        calls.append((q.shape[1], k.shape[1], causal))
        return bottom_right(q, k, v, scale=scale, causal=causal)

    monkeypatch.setattr(local, "choose_backend", lambda q, spec: backend)
    for case in (Case(causal=False), Case(n_keys=7), Case(q_offset=9)):
        tensors = case.tensors()
        assert_is(case.attend(*tensors), case.reference(*tensors))
    assert calls == [(7, 9, False), (7, 7, True), (7, 9, False)]


def test_the_cpu_takes_the_plain_path():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert local.choose_backend(torch.zeros(1, 1, 1, 8, dtype=dtype), AttentionSpec(1.0)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [16, 64])
def test_the_self_test_accepts_a_backend_of_the_right_convention(head_dim, dtype):
    assert local.check_convention(bottom_right, CPU, dtype, head_dim) is None


@pytest.mark.parametrize("backend", [base_two, top_left, rows_before_heads, lse_of_unscaled_scores, half_precision_lse])
def test_the_self_test_catches_a_backend_of_another_convention(backend):
    text = (
        f"attention back-end {backend.__name__} fails its self-test on cpu with torch.float32, head_dim 16: "
        "its lse or its mask follows another convention"
    )
    with pytest.raises(RuntimeError, match=f"^{text}$"):
        local.check_convention(backend, CPU, torch.float32, 16)


def test_the_self_test_runs_once_a_backend_and_shape():
    calls = []

    def backend(q, k, v, *, scale, causal):
        calls.append(q.shape)
        return bottom_right(q, k, v, scale=scale, causal=causal)

    for _ in range(3):
        local.check_convention(backend, CPU, torch.float32, 16)
    assert len(calls) == 1
    local.check_convention(backend, CPU, torch.float32, 32)
    assert len(calls) == 2


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
