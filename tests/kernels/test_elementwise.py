"""The element-wise Triton kernels, interpreted on CPUs, against the formulas that the tests of models use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ds_ring.kernels import elementwise, elementwise_kernel
from ds_ring.kernels.elementwise import NormSpec
from ds_ring.kernels.triton_probe import triton_usable
from tests.helpers.triton_interpreter import INTERPRETED

pytestmark = INTERPRETED


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setattr("ds_ring.kernels.elementwise.kernels_run_on", lambda tensor: True)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [48, 77])
@pytest.mark.parametrize("spec", [NormSpec(True, 0.0, 1e-3), NormSpec(False, 0.0, 1e-3), NormSpec(False, 1.0, 1e-3)])
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("terms", [1, 2])
def test_sum_and_norm(width, spec, folded, terms):
    summands = tuple(random(2, 5, width, seed=i) for i in range(terms))
    weight = random(width, seed=7)
    bias, fold = (random(width, seed=8) if spec.centred else None), (random(width, seed=9) if folded else None)
    total, normed = elementwise.add_norm(summands, spec, weight, bias, fold)
    want = sum(summands).double()
    centred = want - want.mean(-1, keepdim=True) if spec.centred else want
    normal = centred / (centred.square().mean(-1, keepdim=True) + spec.eps).sqrt() * (spec.offset + weight.double())
    torch.testing.assert_close(normed.double(), normal + (0 if bias is None else bias), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(total.double(), want + (0 if fold is None else fold), atol=1e-6, rtol=1e-6)


def test_a_sum_alone_and_a_norm_alone():
    a, b, fold = random(3, 48), random(3, 48, seed=1), random(48, seed=2)
    total, normed = elementwise.add_norm((a, b), None, fold_W=fold)
    assert normed is None
    torch.testing.assert_close(total, a + b + fold)
    total, normed = elementwise.add_norm((a,), NormSpec(False, 0.0, 1e-6), want_total=False)
    assert total is None
    torch.testing.assert_close(normed, a / (a.square().mean(-1, keepdim=True) + 1e-6).sqrt())


def test_a_sum_of_one_term_is_a_copy():
    a = random(3, 48)
    total, _ = elementwise.add_norm((a,), None)
    assert torch.equal(total, a)
    assert total.data_ptr() != a.data_ptr()


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "gelu", "relu"])
@pytest.mark.parametrize("width", [33, 2500])
def test_gates(kind, width):
    both = 3 * random(2, 3, 2 * width)
    gate, up = both.chunk(2, dim=-1)  # parts of one projection, as they lie
    got = elementwise.gated(kind, gate, up)
    want = elementwise.activate(kind, gate.double()) * up.double()
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def test_a_gate_of_no_columns():
    assert elementwise.gated("silu", torch.empty(2, 3, 0), torch.empty(2, 3, 0)).shape == (2, 3, 0)


@pytest.mark.parametrize("rotary", [16, 12, 6])
@pytest.mark.parametrize("positions", [1, 2])
def test_rotary_of_parts_of_a_fused_projection(rotary, positions):
    """GPT-NeoX has q, k and v of a head side by side."""
    batch, tokens, heads, width = 2, 7, 3, 16
    qkv = random(batch, tokens, heads, 3 * width).transpose(1, 2)
    q, k, _ = qkv.chunk(3, dim=-1)
    k = k[:, :2]
    angle = random(positions, tokens, rotary // 2, seed=1)
    cos, sin = (torch.cat((f(angle), f(angle)), -1) for f in (torch.cos, torch.sin))
    before = qkv.clone()
    for got, x in zip(elementwise.rotate(q, k, cos, sin), (q, k), strict=True):
        pairs = torch.complex(x[..., : rotary // 2].double(), x[..., rotary // 2 : rotary].double())
        rotated = pairs * torch.polar(torch.ones(()).double(), angle.double())[:, None]
        want = torch.cat((rotated.real, rotated.imag, x[..., rotary:].double()), -1)
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
        assert got.transpose(1, 2).is_contiguous()
    assert torch.equal(qkv, before)


@pytest.mark.parametrize("rotary", [16, 12, 6])
@pytest.mark.parametrize("positions", [1, 2])
def test_rotary_in_place_is_rotary_and_touches_nothing_else(rotary, positions):
    qkv = random(2, 7, 3, 48).transpose(1, 2)
    _, k, _ = qkv.chunk(3, dim=-1)
    angle = random(positions, 7, rotary // 2, seed=1)
    cos, sin = (torch.cat((f(angle), f(angle)), -1) for f in (torch.cos, torch.sin))
    want = qkv.clone()
    want[..., 16:32] = elementwise.rotated(k, cos, sin)
    assert elementwise.rotate_(k, (cos, sin)) is k
    assert torch.equal(qkv, want)


@pytest.mark.parametrize("rotates", [True, False])
def test_heads_put_into_a_part_of_a_tensor_touch_nothing_else(rotates):
    """As into a part of a shared tensor, or between the heads that go to other ranks."""
    x, memory = random(2, 5, 7, 16)[:, 1:4], torch.full((2, 9, 6, 16), torch.nan)
    angle = random(1, 7, 4, seed=1)
    cos, sin = (torch.cat((f(angle), f(angle)), -1) for f in (torch.cos, torch.sin))
    elementwise.put(x, memory[:, 1:8, 2:5], (cos, sin) if rotates else None)
    want = elementwise.rotated(x, cos, sin) if rotates else x
    torch.testing.assert_close(memory[:, 1:8, 2:5], want.transpose(1, 2), atol=0, rtol=0)
    assert int(memory.isnan().sum()) == memory.numel() - x.numel()


def test_the_self_test_passes_and_sees_another_result(monkeypatch):
    assert elementwise.self_test(torch.device("cpu"), torch.float32) is None
    gate = elementwise_kernel.gate
    monkeypatch.setattr(elementwise_kernel, "gate", lambda kind, x, up: gate("gelu", x, up))
    assert "self-test fails on cpu (case 2)" in str(elementwise.self_test(torch.device("cpu"), torch.float32))


def test_kernels_that_cannot_run_are_named_once(monkeypatch, caplog):
    def broken(*args: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(elementwise_kernel, "put", broken)
    triton_usable.cache_clear()
    trial = "element-wise work", elementwise.self_test, torch.device("cpu"), torch.float32
    assert not any(triton_usable(*trial) for _ in range(2))
    triton_usable.cache_clear()
    assert [r.getMessage() for r in caplog.records] == [
        "element-wise work in torch.float32 goes without Triton's kernels: RuntimeError: no compiler"
    ]


def test_a_trial_without_memory_decides_nothing():
    device, memory = torch.device("cpu"), iter([torch.OutOfMemoryError("full"), None])

    def trial(device, dtype):
        if error := next(memory):
            raise error

    with pytest.raises(torch.OutOfMemoryError, match="full"):
        triton_usable("anything", trial, device, torch.float32)
    assert triton_usable("anything", trial, device, torch.float32)
