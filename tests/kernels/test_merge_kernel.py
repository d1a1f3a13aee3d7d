"""The Triton kernel that merges, interpreted on CPUs, against the PyTorch formula; on a GPU, compiled."""

# Shapes: B batch, L queries, H heads, D head_dim.
from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ds_ring.attention import merge
from ds_ring.attention.merge import merge_into, merge_plainly
from ds_ring.kernels import merge_kernel
from tests.helpers.marks import ON_A_GPU
from tests.helpers.triton_interpreter import INTERPRETED

CPU = torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(
    autouse=True, params=[pytest.param(CPU, marks=INTERPRETED), pytest.param(torch.device("cuda"), marks=ON_A_GPU)]
)
def device(request, monkeypatch):
    if request.param == CPU:
        monkeypatch.setattr(merge, "_kernel_runs_on", lambda tensor: True)
    return request.param


def partial(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """As kernels give them: tokens after each other, parts of larger memory; some queries see nothing."""
    generator = torch.Generator().manual_seed(seed)
    batch, length, heads, width = shape
    out = torch.randn(batch, length + 2, heads, width + 3, generator=generator)[:, 1:-1, :, 2 : width + 2]
    lse = 9 * torch.randn(batch, heads, length, generator=generator)
    unseen = torch.rand(lse.shape, generator=generator) < 0.2
    lse[unseen] = -torch.inf
    out[unseen.transpose(1, 2)] = 0
    return out.to(dtype).to(device), lse.to(device)


@pytest.mark.parametrize("shape", [(1, 5, 3, 16), (2, 17, 8, 128), (1, 2, 40, 80), (3, 0, 2, 16), (1, 1, 1, 256)])
@pytest.mark.parametrize("second", DTYPES, ids=str)
@pytest.mark.parametrize("to", [torch.float32, None], ids=["fp32", "its dtype"])
def test_as_in_fp64(shape, second, to, device):
    into = to or second
    a, b = partial(shape, into, device, 1), partial(shape, second, device, 2)
    got = torch.empty(shape, dtype=into, device=device), torch.empty_like(a[1])
    merge_into(*got, a, b)
    want = torch.zeros(shape, dtype=torch.float64, device=device)
    weights = [torch.exp(lse.double() - torch.logaddexp(a[1], b[1]).double()).nan_to_num(0.0) for _, lse in (a, b)]
    for (out, _), weight in zip((a, b), weights, strict=True):
        want.add_(out.double() * weight.transpose(1, 2)[..., None])
    limit = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[into]
    torch.testing.assert_close(got[0].double(), want, atol=limit, rtol=limit)
    torch.testing.assert_close(got[1].double(), torch.logaddexp(a[1].double(), b[1].double()), atol=2e-6, rtol=1e-6)


def test_in_place_in_a_part_of_larger_memory(device):
    a, b = partial((2, 7, 3, 24), torch.float32, device, 3), partial((2, 7, 3, 24), torch.float16, device, 4)
    out, lse = torch.full((2, 9, 5, 24), 7.0, device=device), torch.full((2, 5, 9), 7.0, device=device)
    place = out[:, 1:8, 1:4], lse[:, 1:4, 1:8]
    for to, of in zip(place, a, strict=True):
        to.copy_(of)
    want = torch.empty_like(a[0]), torch.empty_like(a[1])
    merge_plainly(*want, a, b)
    merge_into(*place, place, b)
    for g, w in zip(place, want, strict=True):
        torch.testing.assert_close(g, w, atol=2e-6, rtol=1e-6)
    for memory, part in ((out, place[0]), (lse, place[1])):
        assert int((memory == 7).sum()) == memory.numel() - part.numel()


@pytest.mark.parametrize("low", [-math.inf, -1e4, 0.0])
def test_infinities(low, device):
    def side(out: float, lse: float) -> tuple[Tensor, Tensor]:
        return torch.full((1, 1, 1, 1), out, device=device), torch.full((1, 1, 1), lse, device=device)

    def merged(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[float, float]:
        merge_into(*first, first, second)
        return first[0].item(), first[1].item()

    assert merged(side(3.0, math.inf), side(7.0, low)) == (3.0, math.inf)
    assert merged(side(7.0, low), side(3.0, math.inf)) == (3.0, math.inf)
    assert merged(side(3.0, math.inf), side(7.0, math.inf)) == (7.0, math.inf)
    assert merged(side(0.0, -math.inf), side(3.0, low)) == ((3.0, low) if low > -math.inf else (0.0, low))
    assert merged(side(3.0, low), side(0.0, -math.inf))[1] == low


def test_the_self_test_passes_and_sees_another_result(monkeypatch, device):
    assert [merge.self_test(device, dtype) for dtype in DTYPES] == [None] * 3
    right = merge_kernel.merge
    monkeypatch.setattr(merge_kernel, "merge", lambda out, lse, a, a_lse, b, b_lse: right(out, lse, a, b_lse, b, a_lse))
    assert "its self-test fails" in str(merge.self_test(device, torch.float16))
