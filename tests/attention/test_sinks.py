"""Attention sinks, held against an fp64 softmax with one more column."""

# Shapes: B batch, L queries, S keys, H heads, D head_dim.
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_ring.attention import sinks
from ds_ring.attention.block import attend
from ds_ring.attention.spec import AttentionSpec
from tests.helpers.attention_problems import sink_reference

SPEC = AttentionSpec(0.5)


def with_one_more_column(q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor) -> Tensor:
    """The definition: the sink's score joins each query's softmax and its weight is dropped."""
    q, k, v = q.double(), k.double(), v.double()
    scores_BHLS = torch.einsum("blhd,bshd->bhls", q, k) * SPEC.scale
    hidden_LS = torch.ones(q.shape[1], k.shape[1]).triu(1).bool()
    scores_BHLS = scores_BHLS.masked_fill(hidden_LS, -math.inf)
    column = sinks_H.double().view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[1], 1)
    weights_BHLS = torch.softmax(torch.cat((scores_BHLS, column), -1), -1)[..., :-1]
    return torch.einsum("bhls,bshd->blhd", weights_BHLS, v)


@settings(max_examples=60)
@given(
    scale=st.sampled_from([0.0, 1.0, 10.0, 100.0]),
    shift=st.sampled_from([-1e4, -50.0, 0.0, 50.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_a_sink_is_one_more_column_of_the_softmax(scale, shift, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 9, 3, 4, generator=generator) for _ in range(3))
    sinks_H = (scale * torch.randn(3, generator=generator) + shift).to(dtype)
    out, lse = attend(q, k, v, spec=SPEC)
    got = sinks.apply_(out, lse, sinks_H)
    assert got is out
    torch.testing.assert_close(out.double(), with_one_more_column(q, k, v, sinks_H), atol=2e-6, rtol=2e-5)


def test_the_tests_of_whole_layouts_use_the_same_definition():
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 9, 3, 4, generator=generator).double() for _ in range(3))
    sinks_H = torch.randn(3, generator=generator)
    out, lse = attend(q.float(), k.float(), v.float(), spec=SPEC)
    want = with_one_more_column(q, k, v, sinks_H)
    torch.testing.assert_close(sink_reference(out.double(), lse.double(), sinks_H), want, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("sink", [-math.inf, -1e4, 0.0, 1e4, math.inf])
def test_a_query_that_sees_no_key_stays_zero_whatever_the_sink(sink):
    out, lse = torch.zeros(1, 2, 1, 3), torch.tensor([[[-math.inf, 1.0]]])
    out[:, 1] = 5.0
    sinks.apply_(out, lse, torch.tensor([sink]))
    assert (out[:, 0] == 0).all()
    assert torch.isfinite(out).all()


def test_no_sinks_and_sinks_at_minus_infinity_change_nothing():
    out, lse = torch.randn(2, 5, 3, 4), torch.randn(2, 3, 5)
    want = out.clone()
    for none in (None, torch.full((3,), -math.inf)):
        assert torch.equal(sinks.apply_(out, lse, none), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_rounded_once(dtype):
    generator = torch.Generator().manual_seed(2)
    out = torch.randn(2, 50, 3, 8, generator=generator).to(dtype)
    lse, sinks_H = torch.randn(2, 3, 50, generator=generator), torch.randn(3, generator=generator).to(dtype)
    want = sink_reference(out.double(), lse.double(), sinks_H)
    got = sinks.apply_(out, lse, sinks_H)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=torch.finfo(dtype).eps / 2 * 1.01)
