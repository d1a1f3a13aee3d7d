"""On a GPU: the compiled Triton kernel against the fp64 reference.

Every combination of head size, dtypes, features (causal, window, softcap, previous result) and alignment is compiled,
in a second or two; lengths, offsets and numbers of heads are not compiled in. So tests share combinations and vary the
rest, at one tile size a head size (``pinned_tiles``) but for the tests of tile sizes. About 90 variants are compiled:
32 for the tile sizes, 12 small ones for a trial among them, the rest for the features.
"""

# Shapes: B batch, L queries, S keys, H query heads, K key/value heads, D head_dim.
import math
from contextlib import contextmanager
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_ring.attention.merge import merge_
from ds_ring.attention.reference import reference_attention
from ds_ring.attention.spec import AttentionSpec
from ds_ring.kernels import triton_attention
from tests.helpers.marks import ON_A_GPU
from tests.helpers.pinned_tiles import pinned_tiles

pytestmark = ON_A_GPU

CUDA = torch.device("cuda")
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}


@pytest.fixture(autouse=True, scope="module")
def kernel(tuner):
    """At pinned tile sizes, and with NaN in the outputs wherever it leaves them unwritten."""
    reason = triton_attention.unavailable(CUDA)
    if reason is not None:
        pytest.skip(f"our Triton kernel cannot run: {reason}")
    from ds_ring.kernels import triton_attention_kernel

    outputs = triton_attention._outputs
    with pytest.MonkeyPatch.context() as patch, pinned_tiles():
        patch.setattr(triton_attention, "_outputs", lambda *args: tuple(t.fill_(math.nan) for t in outputs(*args)))
        yield triton_attention_kernel


@pytest.fixture(scope="session")
def tuner():
    from ds_ring.kernels import triton_attention_kernel

    return triton_attention_kernel.tuned_forward


@contextmanager
def trials(kernel, tuner, suitable):
    """The tile size is found by trial among those that ``suitable`` gives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "tuned_forward", tuner)
        patch.setattr(tuner, "early_config_prune", suitable)
        patch.setattr(tuner, "cache", {})
        yield


def relative_error(got, want):
    return float((got.double() - want).norm() / want.norm())


def random_qkv(queries, keys, head_dim, dtype=torch.float16, heads=4, kv_heads=2, batch=2, seed=0):
    """Slices of one projection: strided, and aligned to 16 bytes only where head_dim is a multiple of 8."""
    generator = torch.Generator(CUDA).manual_seed(seed)
    fused = torch.randn(batch, max(queries, keys), heads + 2 * kv_heads, head_dim, device=CUDA, generator=generator)
    fused = fused.to(dtype)
    return fused[:, :queries, :heads], fused[:, :keys, heads : heads + kv_heads], fused[:, :keys, heads + kv_heads :]


def attend(q, k, v, spec, causal=True, q_offset=0, k_offset=0, **more):
    return triton_attention.attention(
        q, k, v, scale=spec.scale, causal=causal, q_offset=q_offset, k_offset=k_offset, window=spec.window,
        softcap=spec.softcap, **more,
    )  # fmt: skip


def assert_is(got, want, tolerance):
    (out, lse), (want_out, want_lse) = got, (t.double() for t in want)
    assert torch.isfinite(out).all()
    assert lse.dtype == torch.float32
    seen = ~torch.isinf(want_lse)
    assert torch.equal(torch.isneginf(lse), ~seen)
    assert not out.transpose(1, 2)[~seen].any()
    if seen.any():
        assert relative_error(out, want_out) < tolerance
        torch.testing.assert_close(lse[seen].double(), want_lse[seen], atol=2e-3, rtol=1e-4)


def assert_is_reference(got, q, k, v, spec, causal=True, q_offset=0, k_offset=0):
    want = reference_attention(q, k, v, spec=spec, causal=causal, q_offset=q_offset, k_offset=k_offset)
    assert_is(got, want, TOLERANCE[q.dtype])


@pytest.mark.parametrize("windowed", [False, True], ids=["all", "window"])
@pytest.mark.parametrize("capped", [False, True], ids=["plain", "softcap"])
@pytest.mark.parametrize("previous", [False, True], ids=["alone", "carried"])
@settings(max_examples=25)
@given(
    lengths=st.tuples(st.integers(1, 600), st.integers(0, 600)),
    heads=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4)),
    causal=st.booleans(),
    offsets=st.tuples(st.integers(0, 700), st.integers(0, 700)),
    window=st.integers(0, 700),
    softcap=st.floats(0.5, 50.0),
    seed=st.integers(0, 1000),
)
def test_any_block_is_reference_attention(
    windowed, capped, previous, lengths, heads, causal, offsets, window, softcap, seed
):
    """Blind rows, windows with nothing in them, grouped heads, running results."""
    (n_queries, n_keys), (batch, kv_heads, group) = lengths, heads
    q, k, v = random_qkv(n_queries, n_keys, 64, heads=kv_heads * group, kv_heads=kv_heads, batch=batch, seed=seed)
    spec = AttentionSpec(0.125, window if windowed and causal else None, softcap if capped else None)
    where = {"causal": causal, "q_offset": offsets[0], "k_offset": offsets[1]}
    want = reference_attention(q, k, v, spec=spec, **where)
    if not previous:
        assert_is(attend(q, k, v, spec, **where), want, 1e-3)
        return
    before = torch.randn(q.shape, device=CUDA), torch.randn(batch, kv_heads * group, n_queries, device=CUDA)
    before[0][:, ::3] = math.nan  # beside an lse of -inf it may be anything
    before[1][:, :, ::3] = -math.inf
    got = attend(q, k, v, spec, previous=before, **where)
    merged = before[0].nan_to_num(), before[1].clone()
    merge_(*merged, *(t.float() for t in want))
    assert got[0].dtype == torch.float32
    assert_is(got, merged, 1e-3)


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        (64, torch.bfloat16), (80, torch.bfloat16), (128, torch.float16), (256, torch.bfloat16), (512, torch.float16),
        (512, torch.bfloat16),
    ],
)  # fmt: skip
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_a_block_of_any_lengths(head_dim, dtype, causal):
    spec = AttentionSpec(head_dim**-0.5)
    for queries, keys, q_offset in ((1999, 1999, 0), (1, 777, 776), (300, 100, -40), (129, 513, 384)):
        q, k, v = random_qkv(queries, keys, head_dim, dtype)
        assert_is_reference(attend(q, k, v, spec, causal, q_offset), q, k, v, spec, causal, q_offset)


@pytest.mark.parametrize(("head_dim", "kv_heads"), [(1, 4), (5, 1), (33, 2), (96, 1), (192, 4), (300, 1)])
def test_any_head_size(head_dim, kv_heads):
    q, k, v = random_qkv(333, 333, head_dim, kv_heads=kv_heads)
    spec = AttentionSpec(head_dim**-0.5)
    assert_is_reference(attend(q, k, v, spec), q, k, v, spec)


@pytest.mark.parametrize("head_dim", [64, 256])
def test_fp32_is_exact(head_dim):
    q, k, v = random_qkv(301, 301, head_dim, torch.float32)
    spec = AttentionSpec(head_dim**-0.5)
    assert_is_reference(attend(q, k, v, spec), q, k, v, spec)


@pytest.mark.parametrize("head_dim", [128, 512])
@pytest.mark.parametrize(("window", "softcap"), [(1, None), (200, None), (1024, 50.0)])
def test_windows_and_softcap(head_dim, window, softcap):
    q, k, v = random_qkv(1501, 1501, head_dim)
    spec = AttentionSpec(head_dim**-0.5, window, softcap)
    for q_offset in (0, 700):  # one's own block; a block of earlier keys, partly behind the window
        got = attend(q, k, v, spec, q_offset=q_offset)
        assert_is_reference(got, q, k, v, spec, q_offset=q_offset)


@pytest.mark.parametrize(("head_dim", "window"), [(64, None), (64, 600), (512, None)])
def test_state_carried_over_blocks_gives_attention_over_all_of_them(head_dim, window):
    cuts = [500, 17, 983, 1, 499]
    q, k, v = random_qkv(900, sum(cuts), head_dim)
    spec = AttentionSpec(head_dim**-0.5, window)
    state = torch.full(q.shape, math.nan, device=CUDA), torch.full((2, 4, 900), -math.inf, device=CUDA)
    for start, stop in reversed(list(pairwise(accumulate(cuts, initial=0)))):
        state = attend(q, k[:, start:stop], v[:, start:stop], spec, q_offset=1100, k_offset=start, previous=state)
    assert state[0].dtype == torch.float32
    assert_is_reference(state, q, k, v, spec, q_offset=1100)


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(64, torch.float16), (128, torch.float16), (256, torch.float16), (512, torch.float16), (64, torch.float32)],
)
def test_every_tile_size_is_correct(kernel, head_dim, dtype):
    """Each once, by TMA and without it in turn."""
    from triton.runtime.errors import OutOfResources

    tma = torch.version.cuda is not None and torch.cuda.get_device_capability() >= (9, 0)
    tiles = {}
    for config in kernel.configs(head_dim, dtype):
        sizes = tuple((name, value) for name, value in config.all_kwargs().items() if name != "USE_TMA")
        tiles.setdefault(sizes, []).append(config)
    q, k, v = random_qkv(300, 600, head_dim, dtype)
    spec = AttentionSpec(head_dim**-0.5, window=250)
    out, lse = reference_attention(q, k[:, :300], v[:, :300], spec=spec, q_offset=300)
    state, fit = (out.float(), lse.float()), 0  # of the last rows: nothing
    for number, (with_tma, *without) in enumerate(tiles.values()):
        config = without[0] if without and not (tma and number % 2 == 0) else with_tma
        with pinned_tiles(lambda *_, config=config: config):
            try:
                got = attend(q, k[:, 300:], v[:, 300:], spec, previous=state)
            except OutOfResources:
                continue
        fit += 1
        assert_is_reference(got, q, k, v, spec, q_offset=300)
    assert fit


def test_the_fastest_tile_size_is_chosen_once(kernel, tuner):
    q, k, v = random_qkv(1000, 1000, 16)
    spec = AttentionSpec(0.25)
    asked = []

    def suitable(*args, **meta):
        asked.append(kernel.suitable_configs(*args, **meta))
        return asked[-1]

    with trials(kernel, tuner, suitable):
        for length in (1000, 999, 600):  # one bucket
            q, k, v = q[:, :length], k[:, :length], v[:, :length]
            assert_is_reference(attend(q, k, v, spec), q, k, v, spec)
            assert tuner.best_config in asked[0]
    assert len(asked) == 1
    assert len(asked[0]) > 5


def test_a_long_block_takes_the_tile_size_of_a_part_of_it(kernel, tuner):
    q, k, v = random_qkv(9001, 9001, 64, heads=1, kv_heads=1, batch=1)
    spec = AttentionSpec(0.125, window=1000)
    tried = []

    def last(_configs, arguments, **meta):
        tried.append(arguments["q"].shape[1])
        return kernel.suitable_configs(None, arguments, **meta)[-1:]

    with trials(kernel, tuner, last):
        assert_is_reference(attend(q, k, v, spec), q, k, v, spec)
    assert tried == [kernel.TUNING_LENGTH]


def test_a_capture_before_the_tile_size_is_chosen_says_so(kernel, tuner):
    q, k, v = random_qkv(50, 50, 7)
    with trials(kernel, tuner, lambda *args, **meta: kernel.suitable_configs(*args, **meta)[-1:]):
        with pytest.raises(RuntimeError, match="call it once before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            attend(q, k, v, AttentionSpec(1.0))
        torch.cuda.synchronize()
        assert_is_reference(attend(q, k, v, AttentionSpec(1.0)), q, k, v, AttentionSpec(1.0))


def test_a_block_alone_merged_is_a_block_carried_on():
    q, k, v = random_qkv(700, 700, 64)
    spec = AttentionSpec(0.125)
    before = torch.randn(q.shape, device=CUDA), torch.randn(2, 4, 700, device=CUDA)
    out, lse = attend(q, k, v, spec, previous=before)
    merge_(*before, *attend(q, k, v, spec, out_dtype=torch.float32))
    # Rounded to fp16, the weights of the keys are relative to other maxima.
    assert relative_error(out, before[0].double()) < 1e-4
    torch.testing.assert_close(lse, before[1], atol=1e-5, rtol=1e-5)


def test_heads_before_rows_and_unaligned_rows():
    """The copy engine cannot take the second: its rows start anywhere."""
    spec = AttentionSpec(0.125)
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in random_qkv(517, 517, 64))
    assert_is_reference(attend(q, k, v, spec), q, k, v, spec)
    q, k, v = (torch.randn(2, 517, 4, 67, device=CUDA, dtype=torch.float16)[..., 3:] for _ in range(3))
    assert_is_reference(attend(q, k, v, spec), q, k, v, spec)


@pytest.mark.parametrize("head_dim", [64, 128, 512])
def test_repeats_are_bit_equal(head_dim):
    q, k, v = random_qkv(777, 777, head_dim)
    spec = AttentionSpec(head_dim**-0.5, window=300)
    first = attend(q, k, v, spec)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(attend(q, k, v, spec), first, strict=True))


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_scores_over_the_fp16_range_stay_finite(softcap):
    q, k, v = (t * 300 for t in random_qkv(257, 257, 64))
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


@pytest.mark.parametrize("head_dim", [64, 512])
def test_a_cuda_graph_replays_it(head_dim):
    q, k, v = random_qkv(600, 600, head_dim)
    spec = AttentionSpec(head_dim**-0.5)
    before = torch.randn(q.shape, device=CUDA), torch.randn(2, 4, 600, device=CUDA)
    attend(q, k, v, spec, previous=before)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attend(q, k, v, spec, previous=before)
    for _ in range(3):
        k.copy_(torch.randn_like(k))
        before[1].normal_()
        graph.replay()
        for a, b in zip(got, attend(q, k, v, spec, previous=before), strict=True):
            assert torch.equal(a, b)


def test_torch_compile_sees_one_operator():
    q, k, v = random_qkv(300, 300, 64)
    spec = AttentionSpec(0.125, window=100, softcap=20.0)

    def layer(q, k, v):
        out, lse = attend(2 * q, k, v, spec)
        return out + 1, lse

    for got, want in zip(torch.compile(layer, fullgraph=True)(q, k, v), layer(q, k, v), strict=True):
        torch.testing.assert_close(got, want)
    torch.library.opcheck(triton_attention.triton_attention, (q, k, v, 0.1, True, 0, 100, 20.0, None, None, None))


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
    storage = torch.zeros(2, (1 << 31) + rows * head_dim, device=CUDA, dtype=torch.float16)
    q = storage[:, -rows * head_dim :].view(2, rows, head_dim).transpose(0, 1).unsqueeze(0)
    q.normal_()
    spec = AttentionSpec(0.125)
    assert_is_reference(attend(q, q, q, spec), q, q, q, spec)
