"""On a GPU: the compiled decode kernel against the fp64 reference, in CUDA graphs, and as fast as memory allows."""

# Shapes: B batch, L queries, S keys, H query heads, K key/value heads, D head_dim.
import math

import pytest
import torch

from ds_ring.attention.backends.eager_positions import attention as plain_attention
from ds_ring.attention.backends.positions import EMPTY, attend_positions, kernel_usable, uses_kernel
from ds_ring.attention.reference import reference_attention
from ds_ring.attention.spec import AttentionSpec
from ds_ring.kernels import decode
from tests.helpers.marks import ON_A_GPU

pytestmark = ON_A_GPU
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}


@pytest.fixture(autouse=True, scope="module")
def available():
    reason = decode.unavailable(torch.device("cuda"))
    if reason is not None:
        pytest.skip(f"the decode kernel cannot run: {reason}")


def relative_error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


class Cache:
    """``live`` keys at positions 0, 1, .. of a cache of ``slots`` slots; what is not live holds NaN."""

    def __init__(self, slots, live, head_dim, dtype=torch.float16, heads=8, kv_heads=2, batch=2, n_queries=1):
        shape = batch, slots, kv_heads, head_dim
        self.k, self.v = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2))
        self.q = torch.randn(batch, n_queries, heads, head_dim, device="cuda", dtype=dtype)
        self.k_positions = torch.arange(slots, device="cuda", dtype=torch.int32).repeat(batch, 1)
        self.k_positions[:, live:] = EMPTY
        self.q_positions = torch.arange(live - n_queries, live, device="cuda", dtype=torch.int32).repeat(batch, 1)
        self.live = live
        for cached in (self.k, self.v):
            cached[:, live:] = torch.nan

    @property
    def where(self):
        return {"q_positions_BL": self.q_positions, "k_positions_BS": self.k_positions}

    def attend(self, spec, **more):
        more |= {"scale": spec.scale, "window": spec.window, "softcap": spec.softcap}
        return decode.attention(self.q, self.k, self.v, **self.where, **more)

    def reference(self, spec):
        seen = slice(0, self.live)
        offset = self.live - self.q.shape[1]
        return reference_attention(self.q, self.k[:, seen], self.v[:, seen], spec=spec, causal=True, q_offset=offset)

    def assert_right(self, spec, tolerance=None):
        out, lse = self.attend(spec)
        want_out, want_lse = self.reference(spec)
        assert torch.isfinite(out).all()
        assert relative_error(out, want_out) < (tolerance or TOLERANCE[self.q.dtype])
        torch.testing.assert_close(lse.double(), want_lse, atol=2e-3, rtol=1e-4)


# Every new combination of head size, dtype, feature and tile is compiled, which takes seconds: not all with all.
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        (64, torch.float16), (80, torch.bfloat16), (128, torch.float16), (128, torch.bfloat16), (256, torch.bfloat16),
        (512, torch.float16), (512, torch.bfloat16),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("group", [1, 4, 32])
@pytest.mark.parametrize(("slots", "live"), [(5000, 4999), (9001, 3000), (20, 1)])
def test_a_step_is_reference_attention(head_dim, dtype, group, slots, live):
    cache = Cache(slots, live, head_dim, dtype, heads=2 * group)
    cache.assert_right(AttentionSpec(head_dim**-0.5))


@pytest.mark.parametrize("head_dim", [1, 33, 112, 300])
def test_any_head_size(head_dim):
    Cache(1501, 1400, head_dim).assert_right(AttentionSpec(head_dim**-0.5))


@pytest.mark.parametrize("head_dim", [64, 256])
def test_fp32_is_exact(head_dim):
    Cache(901, 800, head_dim, torch.float32).assert_right(AttentionSpec(head_dim**-0.5))


@pytest.mark.parametrize(
    ("head_dim", "spec"),
    [(64, (200, None)), (128, (None, None)), (128, (1024, 50.0)), (256, (None, None)), (512, (None, None))],
    ids=str,
)
@pytest.mark.parametrize("n_queries", [2, 7, 64, 1000])
def test_several_queries_against_a_cached_prefix(head_dim, n_queries, spec):
    cache = Cache(4500, 4001, head_dim, n_queries=n_queries)
    cache.assert_right(AttentionSpec(head_dim**-0.5, *spec))


@pytest.mark.parametrize(("head_dim", "heads", "kv_heads"), [(512, 16, 16), (512, 16, 4), (128, 32, 8)])
@pytest.mark.parametrize("slots", [32_768, 100_000])
def test_big_caches(head_dim, heads, kv_heads, slots):
    if torch.cuda.mem_get_info()[0] < 72 * slots * kv_heads * head_dim:  # the cache, and one row of it in fp64
        pytest.skip("needs more GPU memory")
    cache = Cache(slots, slots - 77, head_dim, heads=heads, kv_heads=kv_heads, batch=8)
    spec = AttentionSpec(head_dim**-0.5)
    out, lse = cache.attend(spec)
    last = Cache.__new__(Cache)  # the last sequence alone: fp64 of all takes too much memory
    last.q, last.k, last.v, last.live = cache.q[-1:], cache.k[-1:], cache.v[-1:], cache.live
    want_out, want_lse = last.reference(spec)
    assert relative_error(out[-1:], want_out) < TOLERANCE[torch.float16]
    torch.testing.assert_close(lse[-1:].double(), want_lse, atol=2e-3, rtol=1e-4)
    for a, b in zip(cache.attend(spec), (out, lse), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("head_dim", [128, 512])
@pytest.mark.parametrize("n_queries", [1, 9])
def test_slots_in_any_order_rows_of_any_length_and_holes(head_dim, n_queries):
    cache = Cache(3001, 3001, head_dim, n_queries=n_queries, batch=3)
    order = torch.randperm(3001, device="cuda")
    cache.k_positions[0] = cache.k_positions[0][order]
    cache.q_positions[1] -= 1777
    cache.k_positions[2, 500:1300] = EMPTY
    cache.k_positions[2, ::701] = EMPTY
    cache.q_positions[2] = -1  # sees nothing
    gone = (cache.k_positions == EMPTY)[:, :, None, None]
    cache.k.masked_fill_(gone, torch.nan)
    cache.v.masked_fill_(gone, torch.nan)
    spec = AttentionSpec(head_dim**-0.5, window=2500)
    out, lse = cache.attend(spec)
    exact = (t.double().float() for t in (cache.q, cache.k, cache.v))
    want_out, want_lse = plain_attention(*exact, **cache.where, spec=spec)
    assert torch.isfinite(out).all()
    assert relative_error(out, want_out) < TOLERANCE[torch.float16]
    assert not out[2].any()
    assert (lse[2] == -math.inf).all()
    torch.testing.assert_close(lse[:2], want_lse[:2], atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("head_dim", [128, 512])
@pytest.mark.parametrize(("dtype", "windowed"), [(torch.float16, False), (torch.bfloat16, True)], ids=str)
def test_the_self_test_passes_and_the_kernel_is_taken(head_dim, dtype, windowed):
    assert kernel_usable(torch.device("cuda"), dtype, head_dim, windowed, windowed)


@pytest.mark.parametrize("head_dim", [128, 512])
def test_a_cuda_graph_decodes_while_the_cache_fills(head_dim):
    """A step writes its key, then attends; the graph is captured once and its inputs change from step to step."""
    cache = Cache(6000, 3000, head_dim)
    spec = AttentionSpec(head_dim**-0.5)
    attend_positions(cache.q, cache.k, cache.v, **cache.where, spec=spec)
    assert uses_kernel(cache.q, spec)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attend_positions(cache.q, cache.k, cache.v, **cache.where, spec=spec)
    for step in range(5):
        at = 3000 + 700 * step
        live = slice(cache.live, at + 1)
        for cached in (cache.k, cache.v):
            cached[:, live] = torch.randn_like(cached[:, live])
        cache.k_positions[:, live] = torch.arange(live.start, live.stop, device="cuda", dtype=torch.int32)
        cache.q.normal_()
        cache.q_positions.fill_(at)
        cache.live = at + 1
        graph.replay()
        want_out, want_lse = cache.reference(spec)
        assert relative_error(got[0], want_out) < TOLERANCE[torch.float16]
        torch.testing.assert_close(got[1].double(), want_lse, atol=2e-3, rtol=1e-4)
        for a, b in zip(got, attend_positions(cache.q, cache.k, cache.v, **cache.where, spec=spec), strict=True):
            assert torch.equal(a, b)


def test_torch_compile_sees_one_operator():
    cache = Cache(700, 600, 128)
    spec = AttentionSpec(128**-0.5, window=100, softcap=20.0)

    def layer(q, k, v):
        out, lse = decode.attention(2 * q, k, v, **cache.where, scale=spec.scale, window=spec.window)
        return out + 1, lse

    inputs = cache.q, cache.k, cache.v
    for got, want in zip(torch.compile(layer, fullgraph=True)(*inputs), layer(*inputs), strict=True):
        torch.testing.assert_close(got, want)


def test_invisible_keys_cost_next_to_nothing():
    """A cache with room for many more keys than it holds takes the time of those it holds."""
    spec = AttentionSpec(128**-0.5)
    full, spare = (Cache(65_536, live, 128, heads=16, kv_heads=16, batch=8) for live in (65_536, 4096))
    best = dict.fromkeys((full, spare), math.inf)  # of several, in turn: other tests may be on the same GPU
    for _ in range(5):
        for cache in (full, spare):
            cache.attend(spec)
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(10):
                cache.attend(spec)
            stop.record()
            stop.synchronize()
            best[cache] = min(best[cache], start.elapsed_time(stop))
    assert best[spare] < best[full] / 4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_it_runs_where_its_tensors_are():
    cache = Cache(700, 600, 64)
    for name in ("q", "k", "v", "q_positions", "k_positions"):
        setattr(cache, name, getattr(cache, name).to("cuda:1"))
    cache.assert_right(AttentionSpec(0.125))
