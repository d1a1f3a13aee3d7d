"""On a GPU: every back-end by itself against fp64, and running results carried over the blocks of a ring."""

# Shapes: B batch, L queries, S keys, H query heads, K key/value heads, D head_dim.
import pytest
import torch
from torch import Tensor

from ds_ring.attention.backends import (
    CUDNN,
    FLASH,
    HOPPER512,
    MEMORY_EFFICIENT,
    PLAIN,
    PORTABLE,
    Backend,
    Partial,
)
from ds_ring.attention.choice import choose, usable
from ds_ring.attention.local import accumulate_, attend
from ds_ring.attention.reference import reference_attention
from ds_ring.attention.runs import Segment, attend_runs
from ds_ring.attention.spec import AttentionSpec, BlockSpec
from ds_ring.layout import SequenceLayout
from tests.worlds import sink_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU; run make test-gpu on a machine with one"),
]

CUDA = torch.device("cuda", 0)
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""On the relative error in the Frobenius norm; rounding the output alone costs about a quarter of it."""

WIDE = [64, 80, 96, 128, 256]
BACKENDS = {
    "flash": (FLASH, WIDE),
    "cudnn": (CUDNN, WIDE),
    "memory_efficient": (MEMORY_EFFICIENT, [*WIDE, 320]),
    "portable": (PORTABLE, [20, 128, 320]),
    "attention512": (HOPPER512, [512]),
    "plain": (PLAIN, [20, 128]),
}
SERVED = [pytest.param(backend, d, id=f"{name}-{d}") for name, (backend, dims) in BACKENDS.items() for d in dims]


def skip_unless_usable(backend: Backend, head_dim: int, dtype: torch.dtype) -> None:
    """A back-end this GPU cannot run is skipped; one that runs and gives something else must not hide behind that."""
    reason = backend.unusable(CUDA)
    if reason is not None:
        pytest.skip(reason)
    if backend is CUDNN and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("its head sizes are known on Hopper only")
    assert usable(backend, CUDA, dtype, head_dim, False, False)


def tensors(
    head_dim: int, queries: int, keys: int, heads: int, kv_heads: int, dtype: torch.dtype, layout: str = "fused"
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as slices of one fused projection, each by itself, or with heads before tokens in memory."""
    generator = torch.Generator(CUDA).manual_seed(0)
    shape = 2, max(queries, keys), heads + 2 * kv_heads, head_dim
    fused = torch.randn(shape, device=CUDA, generator=generator).to(dtype)
    q, k, v = fused.split((heads, kv_heads, kv_heads), dim=2)
    q, k, v = q[:, :queries], k[:, :keys], v[:, :keys]
    if layout == "contiguous":
        return q.contiguous(), k.contiguous(), v.contiguous()
    if layout == "heads_first":
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    return q, k, v


def assert_is(got: Partial, want: Partial, dtype: torch.dtype) -> None:
    (out, lse), (want_out, want_lse) = got, want
    assert out.shape == want_out.shape
    assert (lse.shape, lse.dtype) == (want_lse.shape, torch.float32)
    assert torch.isfinite(out).all()
    seen = ~torch.isinf(want_lse)
    assert torch.equal(torch.isinf(lse), ~seen)
    assert float((out.double() - want_out).norm() / want_out.norm()) < TOLERANCE[dtype]
    torch.testing.assert_close(lse[seen].double(), want_lse[seen], atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize(("backend", "head_dim"), SERVED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("layout", "heads", "kv_heads"), [("fused", 9, 3), ("contiguous", 4, 4), ("heads_first", 4, 1)]
)
@pytest.mark.parametrize(
    ("queries", "keys", "causal", "shift"),
    [
        (257, 257, True, 0),
        (129, 513, True, 384),
        (200, 331, False, 0),
        (1, 64, True, 63),
        (257, 100, True, 0),
        (100, 257, True, -40),
        (33, 65, True, 100),
    ],
    ids=["square", "rectangle", "full", "one_query", "more_queries", "blind_rows", "sees_all"],
)
def test_every_back_end_matches_the_reference(
    backend, head_dim, dtype, layout, heads, kv_heads, queries, keys, causal, shift
):
    skip_unless_usable(backend, head_dim, dtype)
    if backend is CUDNN and (queries == 1 or shift < 0 or queries > keys):
        pytest.skip("never chosen for such blocks")
    q, k, v = tensors(head_dim, queries, keys, heads, kv_heads, dtype, layout)
    spec = AttentionSpec(head_dim**-0.5)
    want = reference_attention(q, k, v, spec=spec, causal=causal, q_offset=shift)
    for out_dtype in (dtype, torch.float32):
        got = backend.attend(q, k, v, BlockSpec(spec, causal, shift), out_dtype)
        assert got[0].dtype == out_dtype
        assert_is(got, want, dtype)


def test_the_back_end_follows_the_head_size():
    hopper = torch.cuda.get_device_capability() == (9, 0)
    wanted = {20: PORTABLE, 64: CUDNN if hopper else FLASH, 256: CUDNN if hopper else FLASH, 320: PORTABLE}
    wanted[512] = HOPPER512 if hopper else PORTABLE
    square = BlockSpec(AttentionSpec(1.0), True, 0)
    for head_dim, backend in wanted.items():
        q = torch.zeros(1, 2048, 1, head_dim, device=CUDA, dtype=torch.float16)
        assert choose(q, 2048, square) is backend


@pytest.mark.parametrize(("head_dim", "dtype"), [(20, torch.float16), (128, torch.bfloat16), (512, torch.float16)])
@pytest.mark.parametrize(("window", "softcap"), [(50, None), (None, 5.0), (300, 5.0), (1, None)])
@pytest.mark.parametrize(("queries", "keys", "q_offset"), [(257, 257, 0), (129, 513, 384), (100, 257, 400)])
def test_windows_and_softcap(head_dim, dtype, window, softcap, queries, keys, q_offset):
    q, k, v = tensors(head_dim, queries, keys, 4, 2, dtype)
    spec = AttentionSpec(head_dim**-0.5, window, softcap)
    want = reference_attention(q, k, v, spec=spec, q_offset=q_offset)
    assert choose(q, keys, BlockSpec(spec, True, q_offset)) is (PLAIN if PORTABLE.unusable(CUDA) else PORTABLE)
    out, lse = attend(q, k, v, spec=spec, q_offset=q_offset)
    if torch.isinf(want[1]).all():  # behind the window: nothing seen
        assert not out.any()
        assert torch.isneginf(lse).all()
    else:
        assert_is((out, lse), want, dtype)


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(128, torch.float16), (320, torch.bfloat16), (512, torch.float16), (512, torch.bfloat16)]
)
@pytest.mark.parametrize("window", [None, 200])
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


@pytest.mark.parametrize("head_dim", [64, 128, 512])
def test_folding_into_a_part_of_the_rows_leaves_the_others(head_dim):
    q, k, v = tensors(head_dim, 300, 300, 4, 2, torch.float16)
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


@pytest.mark.parametrize("head_dim", [64, 512])
@pytest.mark.parametrize("window", [None, 128])
def test_sinks_over_runs_of_queries(head_dim, window):
    q, k, v = tensors(head_dim, 600, 1000, 4, 2, torch.bfloat16)
    spec, sinks_H = AttentionSpec(head_dim**-0.5, window), torch.randn(4, device=CUDA).bfloat16()
    runs = SequenceLayout(1000, 2).slice_runs(1)
    q = q[:, : sum(r.length for r in runs)]
    segments = [Segment(500, k[:, 500:], v[:, 500:]), Segment(0, k[:, :500], v[:, :500])]
    out = attend_runs(q, runs, segments, spec, sinks_H)
    done = 0
    for run in runs:
        rows = slice(done, done + run.length)
        want = reference_attention(q[:, rows], k, v, spec=spec, q_offset=run.start)
        want_out = sink_reference(*want, sinks_H)
        assert float((out[:, rows].double() - want_out).norm() / want_out.norm()) < TOLERANCE[torch.bfloat16]
        done += run.length
