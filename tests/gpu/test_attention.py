"""On a GPU: every back-end against the fp64 reference on fresh random input, odd lengths included."""

import pytest
import torch

from ds_ring.attention.block import attend
from ds_ring.attention.reference import reference_attention
from ds_ring.attention.spec import AttentionSpec
from ds_ring.errors import is_out_of_memory
from ds_ring.kernels import attention512
from ds_ring.kernels.jit import unavailable
from ds_ring.utils.device import limit_memory, memory_gib
from tests.helpers.marks import ON_A_GPU

pytestmark = ON_A_GPU

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


@pytest.fixture
def hopper():
    reason = unavailable(torch.device("cuda"))
    if reason is not None:
        pytest.skip(f"the head_dim 512 kernel cannot run: {reason}")


def arguments(q, segments, chunks, causal, scale=512**-0.5):
    keys, values, offsets = zip(*segments, strict=True)
    flat = [number for chunk in chunks for number in chunk]
    return q, list(keys), list(values), list(offsets), flat, causal, scale


def whole_call(q, segments, chunks, causal):
    return attention512.attention512(*arguments(q, segments, chunks, causal))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("cuts", [[300, 513, 200], [1, 64, 128, 63, 500], [17] * 40], ids=len)
def test_segments_and_chunks_in_one_call(dtype, heads, kv_heads, cuts):
    """Chunks of queries at positions of their own against segments of unequal, odd lengths, out of order."""
    generator = torch.Generator("cuda").manual_seed(torch.seed() % 2**31)
    total = sum(cuts)
    k, v = (torch.randn(2, total, kv_heads, 512, device="cuda", generator=generator).to(dtype) for _ in range(2))
    starts = [sum(cuts[:i]) for i in range(len(cuts))]
    segments = [(k[:, a : a + n], v[:, a : a + n], a) for a, n in zip(starts, cuts, strict=True)][::-1]
    chunks = [(300, 37, total - 37), (0, 100, 0), (100, 200, total // 2)]
    q = torch.randn(2, 337, heads, 512, device="cuda", generator=generator).to(dtype)
    for causal in (True, False):
        out, lse = whole_call(q, segments, chunks, causal)
        for row, n, offset in chunks:
            rows = slice(row, row + n)
            spec = AttentionSpec(512**-0.5)
            want_out, want_lse = reference_attention(q[:, rows], k, v, spec=spec, causal=causal, q_offset=offset)
            assert relative_error(out[:, rows], want_out) < TOLERANCE[dtype]
            torch.testing.assert_close(lse[:, :, rows].double(), want_lse, atol=1e-4, rtol=1e-5)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state_dtype", [torch.float32, None], ids=["fp32 state", "half state"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_previous_result_is_continued(dtype, state_dtype, in_place):
    """Block after block equals all keys at once; beside an lse of -inf the previous output may be anything."""
    q = torch.randn(2, 300, 4, 512, device="cuda").to(dtype)
    k, v = (torch.randn(2, 500, 2, 512, device="cuda").to(dtype) for _ in range(2))
    chunks = [(0, 100, 0), (100, 200, 300)]
    out = torch.full_like(q, float("nan"), dtype=state_dtype or dtype)
    lse = torch.full((2, 4, 300), -torch.inf, device="cuda")
    for a, b in ((350, 500), (0, 17), (17, 350)):
        call = arguments(q, [(k[:, a:b], v[:, a:b], a)], chunks, True)
        if in_place:
            attention512.accumulate_(out, lse, *call)
        else:
            out, lse = attention512.attention512(*call, previous_out=out, previous_lse=lse, out_dtype=state_dtype)
    spec = AttentionSpec(512**-0.5)
    for row, n, offset in chunks:
        rows = slice(row, row + n)
        want_out, want_lse = reference_attention(q[:, rows], k, v, spec=spec, causal=True, q_offset=offset)
        assert relative_error(out[:, rows], want_out) < TOLERANCE[dtype]
        torch.testing.assert_close(lse[:, :, rows].double(), want_lse, atol=1e-4, rtol=1e-5)


@pytest.mark.usefixtures("hopper")
def test_every_row_is_written_and_repeats_are_bit_equal():
    q, k, v = (torch.randn(2, 777, 4, 512, device="cuda", dtype=torch.float16) for _ in range(3))
    first = whole_call(q, [(k, v, 0)], [(0, 777, 0)], True)
    for _ in range(20):
        # What the caching allocator hands out next holds NaN wherever the kernel would leave it unwritten.
        poison = [torch.full_like(t, float("nan")) for t in first]
        del poison
        again = whole_call(q, [(k, v, 0)], [(0, 777, 0)], True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.usefixtures("hopper")
def test_queries_without_a_visible_key_give_zero_and_minus_infinity():
    q, k, v = (torch.randn(1, 200, 2, 512, device="cuda", dtype=torch.float16) for _ in range(3))
    out, lse = whole_call(q, [(k, v, 100)], [(0, 200, 0)], True)
    assert not out[:, :100].any()
    assert torch.isneginf(lse[:, :, :100]).all()
    assert torch.isfinite(lse[:, :, 100:]).all()


@pytest.mark.usefixtures("hopper")
@pytest.mark.usefixtures("hopper")
def test_a_result_goes_into_memory_of_any_strides():
    """And nowhere else: what lies between stays as it was."""
    q, k, v = (torch.randn(2, 300, 3, 512, device="cuda", dtype=torch.float16) for _ in range(3))
    call = arguments(q, [(k, v, 0)], [(0, 300, 0)], True)
    want_out, want_lse = attention512.attention512(*call)
    memory = torch.full((2, 310, 5, 520), float("nan"), device="cuda", dtype=torch.float16)
    lse = attention512.into_(memory[:, 5:305, 1:4, 8:], *call)
    assert torch.equal(memory[:, 5:305, 1:4, 8:], want_out)
    assert torch.equal(lse, want_lse)
    memory[:, 5:305, 1:4, 8:] = float("nan")
    assert memory.isnan().all()


def test_the_kernel_runs_in_a_cuda_graph_and_under_compile():
    q, k, v = (torch.randn(1, 300, 2, 512, device="cuda", dtype=torch.float16) for _ in range(3))
    want = whole_call(q, [(k, v, 0)], [(0, 300, 0)], True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = whole_call(q, [(k, v, 0)], [(0, 300, 0)], True)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    torch.library.opcheck(torch.ops.ds_ring.attention512, (q, [k], [v], [0], [0, 300, 0], True, 0.04))

    def layer(q, k, v):
        out, lse = whole_call(2 * q, [(k, v, 0)], [(0, 300, 0)], True)
        attention512.accumulate_(out, lse, *arguments(q, [(k, v, 300)], [(0, 300, 300)], True))
        return out + 1, lse

    for got, want in zip(torch.compile(layer, fullgraph=True)(q, k, v), layer(q, k, v), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("head_dim", [128, 512])
def test_scores_over_the_fp16_range_stay_finite(head_dim):
    q = torch.full((1, 64, 2, head_dim), 60.0, device="cuda", dtype=torch.float16)
    out, lse = attend(q, q, q, spec=AttentionSpec(1.0))
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()


def test_a_limited_gpu_is_out_of_memory_in_words_that_count():
    device = torch.device("cuda")
    limit_memory(device, 1.0)
    try:
        with pytest.raises(RuntimeError) as refused:
            torch.empty(2 << 30, dtype=torch.uint8, device=device)
        assert is_out_of_memory(refused.value)
        assert memory_gib(device, 1.0) == 1.0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
