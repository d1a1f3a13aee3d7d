"""On a GPU: every back-end by itself against fp64, and running results carried over the blocks of a ring.

cuDNN builds a plan for every shape, stride, dtype and mask, and Triton compiles every combination of head size, dtypes
and features, a second or more each; the others take any shape as it comes. So cuDNN's blocks are parts of the same
tensors and share two plans a case. In all 24 plans (10 for five cases, 9 for three self-tests, 5 for running results)
and 33 of Triton's variants at one tile size (``pinned_tiles``); tests/gpu/test_triton_attention.py has the
rest of those.
"""

# Shapes: B batch, L queries, S keys, H query heads, K key/value heads, D head_dim.
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_ring.attention.backends.base import (
    ATTENTION512,
    CUDNN,
    EAGER,
    FLASH,
    MEMORY_EFFICIENT,
    TRITON,
    Backend,
    Partial,
)
from ds_ring.attention.backends.select import select_backend, usable
from ds_ring.attention.block import accumulate_, attend
from ds_ring.attention.reference import reference_attention
from ds_ring.attention.segments import Segment, attend_ranges
from ds_ring.attention.spec import AttentionSpec, BlockSpec
from ds_ring.parallel.layout import SequenceLayout
from tests.helpers.attention_problems import sink_reference
from tests.helpers.marks import ON_A_GPU
from tests.helpers.pinned_tiles import pinned_tiles

pytestmark = ON_A_GPU

CUDA = torch.device("cuda", 0)
HALF, BFLOAT = torch.float16, torch.bfloat16
TOLERANCE = {HALF: 1e-3, BFLOAT: 8e-3}
"""On the relative error in the Frobenius norm; rounding the output alone costs about a quarter of it."""
LENGTH = 588
"""Of the tensors that blocks are parts of: strides do not change with a block's shape."""

WIDE = [64, 80, 96, 128, 256]
ANY_SHAPE = {
    "flash": (FLASH, WIDE),
    "memory_efficient": (MEMORY_EFFICIENT, [*WIDE, 320]),
    "attention512": (ATTENTION512, [512]),
    "plain": (EAGER, [20, 128]),
}
"""Back-ends that neither plan nor compile for a shape."""
LAYOUTS = [("fused", 9, 3), ("contiguous", 4, 4), ("heads_first", 4, 1)]
CASES = [
    pytest.param(backend, d, dtype, layout, id=f"{name}-{d}-{str(dtype)[6:]}-{layout[0]}")
    for name, (backend, dims) in ANY_SHAPE.items()
    for d in dims
    for dtype in TOLERANCE
    for layout in LAYOUTS
] + [
    pytest.param(CUDNN, 64, HALF, LAYOUTS[0], id="cudnn-64-float16-fused"),
    pytest.param(CUDNN, 80, BFLOAT, LAYOUTS[1], id="cudnn-80-bfloat16-contiguous"),
    pytest.param(CUDNN, 128, HALF, LAYOUTS[2], id="cudnn-128-float16-heads_first"),
    pytest.param(CUDNN, 128, BFLOAT, LAYOUTS[0], id="cudnn-128-bfloat16-fused"),
    pytest.param(CUDNN, 256, BFLOAT, LAYOUTS[0], id="cudnn-256-bfloat16-fused"),
    pytest.param(TRITON, 20, HALF, LAYOUTS[2], id="triton-20-float16-heads_first"),
    pytest.param(TRITON, 320, HALF, LAYOUTS[0], id="triton-320-float16-fused"),
]
BLOCKS = {
    "square": (257, 257, True, 0),
    "rectangle": (257, 588, True, 331),
    "full": (257, 331, False, 0),
    "one_query": (1, 64, True, 63),
    "more_queries": (257, 100, True, 0),
    "blind_rows": (100, 257, True, -40),
    "sees_all": (33, 65, True, 100),
}
"""Queries, keys, causal, shift."""
FOR_CUDNN = ["square", "rectangle", "full"]


@pytest.fixture(autouse=True, scope="module")
def tiles():
    with pinned_tiles():
        yield


def skip_unless_there(backend: Backend) -> None:
    """What this GPU cannot run is skipped; what runs and gives something else must not hide behind that."""
    reason = backend.unusable(CUDA)
    if reason is not None:
        pytest.skip(reason)
    if backend is CUDNN and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("its head sizes are known on Hopper only")


def tensors(
    head_dim: int, queries: int, keys: int, heads: int, kv_heads: int, dtype: torch.dtype, layout: str = "fused",
    batch: int = 2, length: int = LENGTH,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k and v as slices of one fused projection, each by itself, or with heads before tokens in memory."""
    generator = torch.Generator(CUDA).manual_seed(0)
    shape = batch, max(length, queries, keys), heads + 2 * kv_heads, head_dim
    fused = torch.randn(shape, device=CUDA, generator=generator).to(dtype)
    parts = fused.split((heads, kv_heads, kv_heads), dim=2)
    if layout == "contiguous":
        parts = [t.contiguous() for t in parts]
    if layout == "heads_first":
        parts = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in parts]
    q, k, v = parts
    return q[:, :queries], k[:, :keys], v[:, :keys]


def assert_is(got: Partial, want: Partial, dtype: torch.dtype) -> None:
    (out, lse), (want_out, want_lse) = got, want
    assert out.shape == want_out.shape
    assert (lse.shape, lse.dtype) == (want_lse.shape, torch.float32)
    assert torch.isfinite(out).all()
    seen = ~torch.isinf(want_lse)
    assert torch.equal(torch.isneginf(lse), ~seen)
    assert not out.transpose(1, 2)[~seen].any()
    if seen.any():
        assert float((out.double() - want_out).norm() / want_out.norm()) < TOLERANCE[dtype]
        torch.testing.assert_close(lse[seen].double(), want_lse[seen], atol=2e-3, rtol=1e-4)


def on_poisoned_memory(backend: Backend, q: Tensor, k: Tensor, v: Tensor, block: BlockSpec, out_dtype) -> Partial:
    """What the caching allocator hands out holds NaN wherever the back-end would leave it unwritten."""
    poison = [torch.full_like(q, math.nan, dtype=out_dtype, memory_format=torch.contiguous_format) for _ in range(2)]
    poison += [torch.full((q.shape[0], q.shape[2], q.shape[1]), math.nan, device=CUDA) for _ in range(2)]
    del poison
    return backend.attend(q, k, v, block, out_dtype)


@pytest.mark.parametrize(("backend", "head_dim", "dtype", "layout"), CASES)
def test_every_back_end_matches_the_reference(backend, head_dim, dtype, layout):
    skip_unless_there(backend)
    spec = AttentionSpec(head_dim**-0.5)
    order, heads, kv_heads = layout
    for name in FOR_CUDNN if backend is CUDNN else BLOCKS:
        queries, keys, causal, shift = BLOCKS[name]
        q, k, v = tensors(head_dim, queries, keys, heads, kv_heads, dtype, order)
        want = reference_attention(q, k, v, spec=spec, causal=causal, q_offset=shift)
        block = BlockSpec(spec, causal, shift)
        for out_dtype in (dtype, torch.float32):
            got = on_poisoned_memory(backend, q, k, v, block, out_dtype)
            assert got[0].dtype == out_dtype, name
            assert_is(got, want, dtype)
            again = on_poisoned_memory(backend, q, k, v, block, out_dtype)
            assert all(torch.equal(a, b) for a, b in zip(again, got, strict=True)), name


@pytest.mark.parametrize(
    ("backend", "head_dim"), [(FLASH, 72), (MEMORY_EFFICIENT, 320), (ATTENTION512, 512), (EAGER, 20)]
)
@settings(max_examples=40)
@given(
    lengths=st.tuples(st.integers(1, 700), st.integers(1, 700)),
    heads=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4)),
    causal=st.booleans(),
    shift=st.integers(-300, 800),
)
def test_any_shape_where_none_is_planned_for(backend, head_dim, lengths, heads, causal, shift):
    """And the block folded into a running result, some of whose rows have seen nothing yet."""
    skip_unless_there(backend)
    (queries, keys), (batch, kv_heads, group) = lengths, heads
    q, k, v = tensors(head_dim, queries, keys, kv_heads * group, kv_heads, HALF, batch=batch, length=1)
    spec = AttentionSpec(head_dim**-0.5)
    block = BlockSpec(spec, causal, shift)
    want = reference_attention(q, k, v, spec=spec, causal=causal, q_offset=shift)
    assert_is(on_poisoned_memory(backend, q, k, v, block, HALF), want, HALF)
    into = torch.full_like(q, torch.nan)
    assert_is((into, backend.attend_into_(into, q, k, v, block)), want, HALF)
    half = keys // 2
    if half:
        state = backend.attend(q, k[:, half:], v[:, half:], BlockSpec(spec, causal, shift - half), torch.float32)
        backend.accumulate_(*state, q, k[:, :half], v[:, :half], block)
        assert_is(state, want, HALF)


def test_the_back_end_follows_the_head_size():
    hopper = torch.cuda.get_device_capability() == (9, 0)
    wanted = {20: TRITON, 64: CUDNN if hopper else FLASH, 256: CUDNN if hopper else FLASH, 320: TRITON}
    wanted[512] = ATTENTION512 if hopper else TRITON
    square = BlockSpec(AttentionSpec(1.0), True, 0)
    for head_dim, backend in wanted.items():
        q = torch.zeros(1, 2048, 1, head_dim, device=CUDA, dtype=HALF)
        assert select_backend(q, 2048, square) is backend


@pytest.mark.parametrize(("backend", "head_dim"), [(FLASH, 80), (MEMORY_EFFICIENT, 512), (EAGER, 33)])
def test_what_others_stand_in_for_passes_its_self_test(backend, head_dim):
    assert usable(backend, CUDA, BFLOAT, head_dim, False, False)


@pytest.mark.parametrize(("window", "softcap"), [(50, None), (None, 5.0), (300, 5.0), (1, None)])
@pytest.mark.parametrize(("queries", "keys", "q_offset"), [(257, 257, 0), (129, 513, 384), (100, 257, 400)])
def test_windows_and_softcap(window, softcap, queries, keys, q_offset):
    q, k, v = tensors(16, queries, keys, 4, 2, HALF)
    spec = AttentionSpec(0.25, window, softcap)
    want = reference_attention(q, k, v, spec=spec, q_offset=q_offset)
    assert select_backend(q, keys, BlockSpec(spec, True, q_offset)) is (EAGER if TRITON.unusable(CUDA) else TRITON)
    assert_is(attend(q, k, v, spec=spec, q_offset=q_offset), want, HALF)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "window"),
    [(128, HALF, None), (20, HALF, None), (512, HALF, None), (512, BFLOAT, None), (16, HALF, 200)],
    ids=["cudnn_and_flash", "triton", "attention512", "attention512_bfloat16", "window"],
)
@pytest.mark.parametrize("ring_impl", ["zigzag", "contiguous"])
def test_a_ring_carries_its_running_result(head_dim, dtype, window, ring_impl):
    """The blocks of ``pass_kv``, hop by hop, half blocks among them, against the whole sequence."""
    layout = SequenceLayout(1001, 4, 1, ring_impl)
    q, k, v = tensors(head_dim, layout.padded_length, layout.padded_length, 6, 2, dtype)
    spec = AttentionSpec(head_dim**-0.5, window)
    whole = reference_attention(q, k, v, spec=spec)
    for rank in range(4):
        mine = layout.slice_positions(rank)
        q_slice = q[:, mine]
        out = torch.zeros_like(q_slice, dtype=torch.float32)
        lse = torch.full((2, 6, len(mine)), -torch.inf, device=CUDA)
        for source in range(rank, rank - 4, -1):
            theirs = layout.slice_positions(source % 4)
            k_slice, v_slice = k[:, theirs], v[:, theirs]
            blocks = layout.blocks(rank, source % 4)
            if window is not None:
                blocks = layout.windowed_blocks(rank, source % 4, window)
            for b in blocks:
                accumulate_(
                    out[:, b.q_rows], lse[:, :, b.q_rows], q_slice[:, b.q_rows],
                    k_slice[:, b.k_rows], v_slice[:, b.k_rows],
                    spec=spec, causal=b.causal, q_offset=b.q_offset, k_offset=b.k_offset,
                )  # fmt: skip
        assert_is((out, lse), (whole[0][:, mine], whole[1][:, :, mine]), dtype)


@pytest.mark.parametrize("head_dim", [128, 512])
def test_folding_into_a_part_of_the_rows_leaves_the_others(head_dim):
    q, k, v = tensors(head_dim, 300, 300, 4, 2, HALF)
    spec = AttentionSpec(head_dim**-0.5)
    out, lse = attend(q, k, v, spec=spec, causal=False, out_dtype=torch.float32)
    before = out.clone(), lse.clone()
    rows = slice(100, 237)
    accumulate_(out[:, rows], lse[:, :, rows], q[:, rows], k, v, spec=spec, causal=False)
    for others in (slice(0, 100), slice(237, 300)):
        assert torch.equal(out[:, others], before[0][:, others])
        assert torch.equal(lse[:, :, others], before[1][:, :, others])
    # The same keys once more: the same average, twice the weight.
    torch.testing.assert_close(out, before[0], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(lse[:, :, rows], before[1][:, :, rows] + 0.6931472, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "window"), [(64, HALF, None), (512, BFLOAT, None), (16, HALF, 128)], ids=str
)
def test_sinks_over_runs_of_queries(head_dim, dtype, window):
    q, k, v = tensors(head_dim, 600, 1000, 4, 2, dtype)
    spec, sinks_H = AttentionSpec(head_dim**-0.5, window), torch.randn(4, device=CUDA).to(dtype)
    runs = SequenceLayout(1000, 2).slice_ranges(1)
    q = q[:, : sum(r.length for r in runs)]
    segments = [Segment(500, k[:, 500:], v[:, 500:]), Segment(0, k[:, :500], v[:, :500])]
    out = attend_ranges(q, runs, segments, spec, sinks_H)
    done = 0
    for run in runs:
        rows = slice(done, done + run.length)
        want = reference_attention(q[:, rows], k, v, spec=spec, q_offset=run.start)
        want_out = sink_reference(*want, sinks_H)
        assert float((out[:, rows].double() - want_out).norm() / want_out.norm()) < TOLERANCE[dtype]
        done += run.length
