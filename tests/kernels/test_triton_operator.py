"""The operator around the Triton kernel, interpreted: dtypes, strides, what it refuses, and where it can run."""

import subprocess
import sys

import pytest
import torch

from ds_ring.kernels import triton_attention
from tests.helpers.triton_cases import Case, assert_is
from tests.helpers.triton_interpreter import INTERPRETED

pytestmark = INTERPRETED


def test_dtypes_of_the_output():
    case = Case(n_queries=5, n_keys=5)
    half = case.tensors(torch.float16)
    lse = torch.zeros(1, 2, 5)
    assert case.attend(*half)[0].dtype == torch.float16
    assert case.attend(*half, out_dtype=torch.float32)[0].dtype == torch.float32
    assert case.attend(*half, previous=(torch.zeros(1, 5, 2, 16), lse))[0].dtype == torch.float32
    assert case.attend(*half, previous=(half[0], lse))[0].dtype == torch.float16
    assert case.attend(*case.tensors(), out_dtype=torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("causal", [True, False])
def test_tensors_of_any_strides(causal):
    case = Case(batch=2, n_queries=21, n_keys=21, kv_heads=2, causal=causal)
    q, k, v = case.tensors()
    want = case.reference(q, k, v)
    fused = torch.cat((q, k, v), dim=2).split([4, 2, 2], dim=2)
    transposed = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    last_dim_strided = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in (q, k, v)]
    for strided in (fused, transposed, last_dim_strided):
        assert not any(t.is_contiguous() for t in strided)
        assert_is(case.attend(*strided), want)
    before = torch.randn(q.shape), torch.randn(2, 4, 21)
    want = case.attend(q, k, v, previous=before)
    scattered = torch.randn(2, 21, 4, 32)[..., ::2].copy_(before[0]), torch.randn(2, 21, 4).transpose(1, 2)
    scattered[1].copy_(before[1])
    got = case.attend(q, k, v, previous=scattered)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(1, 6, 2, 8)}, "do not fit together"),
        ({"q": torch.zeros(1, 4, 3, 8)}, "do not fit together"),
        ({"k": torch.zeros(1, 5, 0, 8), "v": torch.zeros(1, 5, 0, 8)}, "do not fit together"),
        ({"q": torch.zeros(1, 4, 2, 8, dtype=torch.float16)}, "not all fp16, bf16 or fp32"),
        ({"scale": 0.0}, "have to be positive"),
        ({"softcap": 0.0}, "have to be positive"),
        ({"previous": (torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2))}, "previous"),
        ({"previous": (torch.zeros(1, 4, 2, 8), torch.zeros(1, 2, 4).half())}, "previous out and lse are"),
        ({name: torch.zeros(1, 4, 2, 513) for name in "qkv"}, "head_dim 513 is not in 1 .. 512"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {"q": torch.zeros(1, 4, 2, 8), "k": torch.zeros(1, 5, 2, 8), "v": torch.zeros(1, 5, 2, 8), "scale": 1.0}
    given |= change
    q, k, v = (given.pop(name) for name in "qkv")
    with pytest.raises(ValueError, match=message):
        triton_attention.attention(q, k, v, causal=True, q_offset=0, k_offset=0, **given)


@pytest.mark.parametrize("previous", [False, True])
def test_the_operator_keeps_its_promises_to_pytorch(previous):
    case = Case(n_queries=9, n_keys=12)
    q, k, v = case.tensors(torch.float16)
    state = (torch.zeros(1, 9, 2, 16), torch.zeros(1, 2, 9)) if previous else (None, None)
    torch.library.opcheck(triton_attention.triton_attention, (q, k, v, 0.25, True, 3, 4, 20.0, *state, None))


def test_torch_compile_sees_one_operator():
    case = Case(n_queries=9, n_keys=12, q_offset=3)
    q, k, v = case.tensors()
    before = torch.randn(q.shape), torch.randn(1, 2, 9)
    compiled = torch.compile(lambda *args: case.attend(*args, previous=before), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(q, k, v), case.attend(q, k, v, previous=before), strict=True):
        assert torch.equal(got, want)


def test_the_module_does_without_triton_until_it_is_used():
    """Without Triton everything can be imported, and the reason why this kernel cannot be used is given."""
    program = """
import sys, importlib.util, torch
importlib.util.find_spec = lambda name, find=importlib.util.find_spec: None if name == "triton" else find(name)
sys.modules["triton"] = None
from ds_ring.attention import block
from ds_ring.kernels import triton_attention
assert triton_attention.unavailable(torch.device("cpu")) == "Triton is not installed"
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_where_it_can_run(monkeypatch):
    triton_attention.unavailable.cache_clear()
    assert triton_attention.unavailable(torch.device("cpu")) is None  # interpreted, here
    triton_attention.unavailable.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "does not compile for cpu" in triton_attention.unavailable(torch.device("cpu"))
    triton_attention.unavailable.cache_clear()
