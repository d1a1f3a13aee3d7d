"""On a GPU: every back-end against the fp64 reference on fresh random input, odd lengths included."""

import pytest
import torch

from ds_ring.attention.local import attend, choose_backend
from ds_ring.attention.reference import reference_attention
from ds_ring.attention.spec import AttentionSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU; run make test-gpu on a machine with one"),
]

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("head_dim", [16, 64, 128, 256, 512])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("queries", "keys", "q_offset"), [(257, 257, 0), (129, 513, 384), (200, 100, 0), (100, 60, -40)]
)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_back_end_matches_the_reference(head_dim, dtype, queries, keys, q_offset, causal, kv_heads):
    seed = torch.seed() % 2**31
    generator = torch.Generator("cuda").manual_seed(seed)
    fused = torch.randn(2, max(queries, keys), 4 + 2 * kv_heads, head_dim, device="cuda", generator=generator).to(dtype)
    q = fused[:, :queries, :4]
    k, v = fused[:, :keys, 4 : 4 + kv_heads], fused[:, :keys, 4 + kv_heads :]
    spec = AttentionSpec(head_dim**-0.5)
    out, lse = attend(q, k, v, spec=spec, causal=causal, q_offset=q_offset)
    want_out, want_lse = reference_attention(q, k, v, spec=spec, causal=causal, q_offset=q_offset)
    assert relative_error(out, want_out) < TOLERANCE[dtype], f"seed {seed}"
    seen = ~torch.isinf(want_lse)
    assert torch.equal(torch.isinf(lse), ~seen)
    torch.testing.assert_close(lse[seen].double(), want_lse[seen], atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize(("head_dim", "name"), [(64, "flash"), (256, "flash"), (512, "memory_efficient")])
def test_the_back_end_follows_the_head_size(head_dim, name):
    q = torch.zeros(1, 1, 1, head_dim, device="cuda", dtype=torch.float16)
    assert choose_backend(q, AttentionSpec(1.0)).__name__ == name


def test_scores_over_the_fp16_range_stay_finite():
    q = torch.full((1, 64, 2, 128), 60.0, device="cuda", dtype=torch.float16)
    out, lse = attend(q, q, q, spec=AttentionSpec(1.0))
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()
