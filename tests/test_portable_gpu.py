"""On a GPU: the compiled Triton kernel with the tile sizes it chooses, against the fp64 reference."""

import math
from contextlib import contextmanager
from itertools import accumulate, pairwise

import pytest
import torch

from ds_ring.attention.merge import merge_
from ds_ring.attention.reference import reference_attention
from ds_ring.attention.spec import AttentionSpec
from ds_ring.kernels import portable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU; run make test-gpu on a machine with one"),
]

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}
HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True, scope="module")
def kernel():
    """Trials among two tile sizes, with and without the copy engine; to compile all of them each time takes long."""
    reason = portable.unavailable(torch.device("cuda"))
    if reason is not None:
        pytest.skip(f"the portable kernel cannot run: {reason}")
    from ds_ring.kernels import portable_kernel

    def two(*args, **meta):
        suitable = portable_kernel.suitable_configs(*args, **meta)
        return list({config.kwargs["USE_TMA"]: config for config in reversed(suitable)}.values())

    with only(portable_kernel.tuned_forward, two):
        yield portable_kernel


@contextmanager
def only(tuner, choose):
    """Let ``choose`` say which tile sizes to try."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuner, "early_config_prune", choose)
        patch.setattr(tuner, "cache", {})
        yield


def relative_error(got, want):
    return float((got.double() - want).norm() / want.norm())


def random_qkv(queries, keys, head_dim, dtype=torch.float16, heads=4, kv_heads=2, batch=2):
    """Slices of one projection: strided, and aligned to 16 bytes only where head_dim is a multiple of 8."""
    generator = torch.Generator("cuda").manual_seed(torch.seed() % 2**31)
    fused = torch.randn(batch, max(queries, keys), heads + 2 * kv_heads, head_dim, device="cuda", generator=generator)
    fused = fused.to(dtype)
    return fused[:, :queries, :heads], fused[:, :keys, heads : heads + kv_heads], fused[:, :keys, heads + kv_heads :]


def attend(q, k, v, spec, causal=True, q_offset=0, k_offset=0, **more):
    return portable.attention(
        q, k, v, scale=spec.scale, causal=causal, q_offset=q_offset, k_offset=k_offset, window=spec.window,
        softcap=spec.softcap, **more,
    )  # fmt: skip


def assert_is_reference(got, q, k, v, spec, causal=True, q_offset=0, k_offset=0, tolerance=None):
    out, lse = got
    want_out, want_lse = reference_attention(q, k, v, spec=spec, causal=causal, q_offset=q_offset, k_offset=k_offset)
    assert torch.isfinite(out).all()
    assert relative_error(out, want_out) < (tolerance or TOLERANCE[q.dtype])
    seen = ~torch.isinf(want_lse)
    assert torch.equal(torch.isneginf(lse), ~seen)
    assert not out.transpose(1, 2)[~seen].any()
    torch.testing.assert_close(lse[seen].double(), want_lse[seen], atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256, 512])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("queries", "keys", "q_offset"), [(1999, 1999, 0), (1, 777, 776), (300, 100, -40)])
def test_a_block_is_reference_attention(head_dim, dtype, causal, queries, keys, q_offset):
    q, k, v = random_qkv(queries, keys, head_dim, dtype)
    spec = AttentionSpec(head_dim**-0.5)
    assert_is_reference(attend(q, k, v, spec, causal, q_offset), q, k, v, spec, causal, q_offset)


@pytest.mark.parametrize("head_dim", [1, 5, 33, 96, 112, 192, 300])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_any_head_size(head_dim, kv_heads):
    q, k, v = random_qkv(333, 333, head_dim, kv_heads=kv_heads)
    spec = AttentionSpec(head_dim**-0.5)
    assert_is_reference(attend(q, k, v, spec), q, k, v, spec)


@pytest.mark.parametrize("head_dim", [64, 256])
def test_fp32_is_exact(head_dim):
    q, k, v = random_qkv(301, 301, head_dim, torch.float32)
    spec = AttentionSpec(head_dim**-0.5)
    assert_is_reference(attend(q, k, v, spec), q, k, v, spec)


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(64, torch.float16), (128, torch.bfloat16), (256, torch.float16), (512, torch.bfloat16)]
)
@pytest.mark.parametrize(("window", "softcap"), [(1, None), (200, None), (1024, 50.0), (None, 30.0)])
def test_windows_and_softcap(head_dim, dtype, window, softcap):
    q, k, v = random_qkv(1501, 1501, head_dim, dtype)
    spec = AttentionSpec(head_dim**-0.5, window, softcap)
    for q_offset in (0, 700):  # one's own block; a block of earlier keys, partly behind the window
        got = attend(q, k, v, spec, q_offset=q_offset)
        assert_is_reference(got, q, k, v, spec, q_offset=q_offset)


@pytest.mark.parametrize(("head_dim", "dtype"), [(80, torch.float16), (128, torch.bfloat16), (512, torch.float16)])
@pytest.mark.parametrize("window", [None, 600])
def test_state_carried_over_blocks_gives_attention_over_all_of_them(head_dim, dtype, window):
    cuts = [500, 17, 983, 1, 499]
    q, k, v = random_qkv(900, sum(cuts), head_dim, dtype)
    spec = AttentionSpec(head_dim**-0.5, window)
    state = torch.full(q.shape, math.nan, device="cuda"), torch.full((2, 4, 900), -math.inf, device="cuda")
    for start, stop in reversed(list(pairwise(accumulate(cuts, initial=0)))):
        state = attend(q, k[:, start:stop], v[:, start:stop], spec, q_offset=1100, k_offset=start, previous=state)
    assert state[0].dtype == torch.float32
    assert_is_reference(state, q, k, v, spec, q_offset=1100)


@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_every_tile_size_is_correct(kernel, head_dim, dtype):
    from triton.runtime.errors import OutOfResources

    q, k, v = random_qkv(300, 600, head_dim, dtype)
    spec = AttentionSpec(head_dim**-0.5, window=250)
    fit = 0
    for config in kernel.configs(head_dim, dtype):
        with only(kernel.tuned_forward, lambda *args, config=config, **meta: [config]):
            if config.kwargs["USE_TMA"] and torch.cuda.get_device_capability() < (9, 0):
                continue
            try:
                state = attend(q, k[:, 300:], v[:, 300:], spec, q_offset=300, k_offset=300, out_dtype=torch.float32)
                state = attend(q, k[:, :300], v[:, :300], spec, q_offset=300, previous=state)
            except OutOfResources:
                continue
            fit += 1
            assert_is_reference(state, q, k, v, spec, q_offset=300)
    assert fit


def test_the_fastest_tile_size_is_chosen_once(kernel):
    q, k, v = random_qkv(1000, 1000, 64)
    spec = AttentionSpec(0.125)
    asked = []

    def suitable(*args, **meta):
        asked.append(kernel.suitable_configs(*args, **meta))
        return asked[-1]

    with only(kernel.tuned_forward, suitable):
        for length in (1000, 999, 600):  # one bucket
            q, k, v = q[:, :length], k[:, :length], v[:, :length]
            assert_is_reference(attend(q, k, v, spec), q, k, v, spec)
            assert kernel.tuned_forward.best_config in asked[0]
    assert len(asked) == 1
    assert len(asked[0]) > 5


def test_a_previous_result_is_merged():
    q, k, v = random_qkv(700, 700, 128)
    spec = AttentionSpec(128**-0.5)
    before = torch.randn(q.shape, device="cuda"), torch.randn(2, 4, 700, device="cuda")
    out, lse = attend(q, k, v, spec, previous=before)
    merge_(*before, *attend(q, k, v, spec, out_dtype=torch.float32))
    assert relative_error(out, before[0].double()) < 1e-5
    torch.testing.assert_close(lse, before[1], atol=1e-5, rtol=1e-5)


def test_heads_before_rows_and_unaligned_rows():
    """The copy engine cannot take the second: its rows start anywhere."""
    spec = AttentionSpec(0.125)
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in random_qkv(517, 517, 64))
    assert_is_reference(attend(q, k, v, spec), q, k, v, spec)
    q, k, v = (torch.randn(2, 517, 4, 67, device="cuda", dtype=torch.float16)[..., 3:] for _ in range(3))
    assert_is_reference(attend(q, k, v, spec), q, k, v, spec)


@pytest.mark.parametrize("head_dim", [64, 128, 512])
def test_every_row_is_written_and_repeats_are_bit_equal(head_dim):
    q, k, v = random_qkv(777, 777, head_dim)
    spec = AttentionSpec(head_dim**-0.5, window=300)
    first = attend(q, k, v, spec)
    for _ in range(20):
        # What the caching allocator hands out next holds NaN wherever the kernel would leave it unwritten.
        poison = [torch.full_like(t, math.nan) for t in first]
        del poison
        assert all(torch.equal(a, b) for a, b in zip(attend(q, k, v, spec), first, strict=True))


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_scores_over_the_fp16_range_stay_finite(softcap):
    q, k, v = (t * 300 for t in random_qkv(257, 257, 128))
    out, lse = attend(q, k, v, AttentionSpec(1.0, softcap=softcap))
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()
    want, _ = reference_attention(q, k, v, spec=AttentionSpec(1.0, softcap=softcap))
    assert relative_error(out, want) < 1e-2


def test_a_nan_reaches_the_rows_that_see_it():
    q, k, v = (t.clone() for t in random_qkv(400, 400, 64))
    k[0, 200] = math.nan
    out, lse = attend(q, k, v, AttentionSpec(0.125))
    assert torch.isnan(out[0, 200:]).all()
    assert torch.isnan(lse[0, :, 200:]).all()
    assert not torch.isnan(out[0, :200]).any()
    assert not torch.isnan(out[1]).any()


@pytest.mark.parametrize("head_dim", [128, 512])
def test_a_cuda_graph_replays_it(head_dim):
    q, k, v = random_qkv(600, 600, head_dim)
    spec = AttentionSpec(head_dim**-0.5)
    before = torch.randn(q.shape, device="cuda"), torch.randn(2, 4, 600, device="cuda")
    attend(q, k, v, spec, previous=before)  # chooses the tile size
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attend(q, k, v, spec, previous=before)
    for _ in range(3):
        k.copy_(torch.randn_like(k))
        before[1].normal_()
        graph.replay()
        for a, b in zip(got, attend(q, k, v, spec, previous=before), strict=True):
            assert torch.equal(a, b)


def test_a_capture_before_the_tile_size_is_chosen_says_so():
    q, k, v = random_qkv(50, 50, 7)
    with pytest.raises(RuntimeError, match="call it once before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        attend(q, k, v, AttentionSpec(1.0))
    torch.cuda.synchronize()
    assert_is_reference(attend(q, k, v, AttentionSpec(1.0)), q, k, v, AttentionSpec(1.0))


def test_torch_compile_sees_one_operator():
    q, k, v = random_qkv(300, 300, 128)
    spec = AttentionSpec(128**-0.5, window=100, softcap=20.0)

    def layer(q, k, v):
        out, lse = attend(2 * q, k, v, spec)
        return out + 1, lse

    for got, want in zip(torch.compile(layer, fullgraph=True)(q, k, v), layer(q, k, v), strict=True):
        torch.testing.assert_close(got, want)
    torch.library.opcheck(portable.portable_attention, (q, k, v, 0.1, True, 0, 100, 20.0, None, None, None))


def test_a_long_block_takes_the_tile_size_of_a_part_of_it():
    q, k, v = random_qkv(9001, 9001, 64, heads=1, kv_heads=1, batch=1)
    spec = AttentionSpec(0.125, window=1000)
    assert_is_reference(attend(q, k, v, spec), q, k, v, spec)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_it_runs_where_its_tensors_are():
    q, k, v = (t.to("cuda:1") for t in random_qkv(100, 100, 64))
    out, lse = attend(q, k, v, AttentionSpec(0.125))
    assert out.device == lse.device == q.device
    assert_is_reference((out, lse), q, k, v, AttentionSpec(0.125))


def test_offsets_beyond_32_bits():
    """The second head lies beyond what a 32-bit offset from the first reaches."""
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB of GPU memory")
    rows, head_dim = 1000, 64
    storage = torch.zeros(2, (1 << 31) + rows * head_dim, device="cuda", dtype=torch.float16)
    q = storage[:, -rows * head_dim :].view(2, rows, head_dim).transpose(0, 1).unsqueeze(0)
    q.normal_()
    spec = AttentionSpec(0.125)
    assert_is_reference(attend(q, q, q, spec), q, q, q, spec)
