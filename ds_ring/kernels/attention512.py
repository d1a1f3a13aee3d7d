"""``torch.ops.ds_ring.attention512``: block attention at head_dim 512 on Hopper GPUs (``sm90/attention512.cu``)."""

# Shapes: B batch, L queries, S keys of a segment, H query heads, K key/value heads.
import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ds_ring.kernels.jit import load_sm90

HEAD_DIM = 512
MAX_SEGMENTS, MAX_CHUNKS = 64, 16
_ALIGNMENT = 8
"""In elements. Strides and base addresses must be multiples of 16 bytes, for the tensor memory accelerator (TMA)."""

Call = tuple[Tensor, list[Tensor], list[Tensor], list[int], list[int], bool, float]
"""q, keys, values, k_offsets, chunks, causal and scale, as ``attention512`` takes them."""

_P, _L, _I = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int


class _Args(ctypes.Structure):
    """``struct Args`` of the source."""

    _fields_ = (
        *((name, _P) for name in ("q", "out", "lse", "previous_out", "previous_lse", "counter", "stream")),
        ("q_strides", _L * 3), ("out_strides", _L * 3), ("lse_strides", _L * 2),
        ("previous_out_strides", _L * 3), ("previous_lse_strides", _L * 2),
        *((name, _I) for name in ("batch", "heads", "kv_heads", "rows", "segments", "chunks", "causal", "bf16")),
        *((name, _I) for name in ("out_fp32", "previous_fp32", "max_ctas")),
        ("scale", ctypes.c_float),
        ("k", _P * MAX_SEGMENTS), ("v", _P * MAX_SEGMENTS),
        ("k_strides", _L * 3 * MAX_SEGMENTS), ("v_strides", _L * 3 * MAX_SEGMENTS),
        ("lengths", _I * MAX_SEGMENTS), ("k_offsets", _I * MAX_SEGMENTS),
        ("chunk_rows", _I * MAX_CHUNKS), ("chunk_lengths", _I * MAX_CHUNKS), ("q_offsets", _I * MAX_CHUNKS),
    )  # fmt: skip


@torch.library.custom_op("ds_ring::attention512", mutates_args=(), device_types="cuda")
def attention512(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    k_offsets: Sequence[int],
    chunks: Sequence[int],
    causal: bool,
    scale: float,
    previous_out: Tensor | None = None,
    previous_lse: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of all queries against all segments of keys, in one launch.

    Args:
        q: [B, L, H, 512], fp16 or bf16, any strides with a contiguous last dimension.
        keys, values: up to 64 segments [B, S, K, 512] each, of any lengths; H is a multiple of K.
        k_offsets: the global position of each segment's first key.
        chunks: (first query, queries, global position of the first query) of up to 16 chunks of queries, flattened;
            together they are all queries.
        causal: a key is visible from queries at its position or later; otherwise from all.
        scale: positive factor on the scores.
        previous_out, previous_lse: the result over other keys, which this call continues: [B, L, H, 512] in fp32 or q's
            dtype, and [B, H, L] fp32. Where the lse is -inf there is no result, whatever the output holds.
        out_dtype: fp32, or q's dtype (None).

    Returns:
        out [B, L, H, 512] in ``out_dtype``; lse [B, H, L], fp32, natural. Queries that see no key: 0 and -inf.
    """
    out, lse = _outputs(q, out_dtype)
    previous = None
    if previous_out is not None:
        assert previous_lse is not None
        previous = (_aligned(previous_out), previous_lse.contiguous())
    _launch(q, keys, values, k_offsets, chunks, causal, scale, previous, (out, lse))
    return out, lse


@attention512.register_fake
def _(
    q: Tensor,
    keys: object,
    values: object,
    k_offsets: object,
    chunks: object,
    causal: bool,
    scale: float,
    previous_out: Tensor | None = None,
    previous_lse: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    return _outputs(q, out_dtype)


@torch.library.custom_op("ds_ring::attention512_into_", mutates_args=("out",), device_types="cuda")
def into_(
    out: Tensor,
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    k_offsets: Sequence[int],
    chunks: Sequence[int],
    causal: bool,
    scale: float,
) -> Tensor:
    """``attention512`` into given memory; returns lse.

    Args:
        out: [B, L, H, 512], fp32 or q's dtype; strides are multiples of 16 bytes, the last dimension contiguous.
    """
    assert _aligned(out) is out
    lse = _lse(q)
    _launch(q, keys, values, k_offsets, chunks, causal, scale, None, (out, lse))
    return lse


@into_.register_fake
def _(
    out: Tensor,
    q: Tensor,
    keys: object,
    values: object,
    k_offsets: object,
    chunks: object,
    causal: bool,
    scale: float,
) -> Tensor:
    return _lse(q)


@torch.library.custom_op("ds_ring::attention512_accumulate_", mutates_args=("out", "lse"), device_types="cuda")
def accumulate_(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    k_offsets: Sequence[int],
    chunks: Sequence[int],
    causal: bool,
    scale: float,
) -> None:
    """``attention512`` continuing from (out, lse), in place.

    Args:
        out: [B, L, H, 512], fp32 or q's dtype; strides are multiples of 16 bytes, the last dimension contiguous.
        lse: [B, H, L], fp32, the last dimension contiguous.
    """
    assert _aligned(out) is out
    _launch(q, keys, values, k_offsets, chunks, causal, scale, (out, lse), (out, lse))


@accumulate_.register_fake
def _(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    keys: object,
    values: object,
    k_offsets: object,
    chunks: object,
    causal: bool,
    scale: float,
) -> None:
    return None


def _launch(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    k_offsets: Sequence[int],
    chunks: Sequence[int],
    causal: bool,
    scale: float,
    previous: tuple[Tensor, Tensor] | None,
    result: tuple[Tensor, Tensor],
) -> None:
    q = _aligned(q)
    keys, values = [_aligned(t) for t in keys], [_aligned(t) for t in values]
    out, lse = result
    batch, rows, heads, _ = q.shape
    triples = sorted(zip(chunks[0::3], chunks[1::3], chunks[2::3], strict=True), key=lambda chunk: chunk[2])
    assert q.shape[3] == HEAD_DIM
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert scale > 0
    assert 0 < len(keys) == len(values) == len(k_offsets) <= MAX_SEGMENTS
    assert 0 < len(triples) <= MAX_CHUNKS
    assert sum(n for _, n, _ in triples) == rows
    for state_out, state_lse in (result, *([previous] if previous else [])):
        assert state_out.shape == q.shape
        assert state_out.dtype in (torch.float32, q.dtype)
        assert state_lse.shape == (batch, heads, rows)
        assert state_lse.dtype == torch.float32
        assert state_lse.stride(2) == 1 or rows == 1
    stream = torch.cuda.current_stream(q.device).cuda_stream
    counter = torch.zeros(2, dtype=torch.int32, device=q.device)
    args = _Args(q=q.data_ptr(), out=out.data_ptr(), lse=lse.data_ptr(), counter=counter.data_ptr(), stream=stream)
    args.q_strides[:], args.out_strides[:] = q.stride()[:3], out.stride()[:3]
    args.lse_strides[:] = lse.stride()[:2]
    if previous:
        args.previous_out, args.previous_lse = (t.data_ptr() for t in previous)
        args.previous_out_strides[:], args.previous_lse_strides[:] = previous[0].stride()[:3], previous[1].stride()[:2]
        args.previous_fp32 = previous[0].dtype == torch.float32
    args.batch, args.heads, args.kv_heads, args.rows = batch, heads, keys[0].shape[2], rows
    args.segments, args.chunks, args.causal, args.bf16 = len(keys), len(triples), causal, q.dtype == torch.bfloat16
    args.out_fp32, args.scale = out.dtype == torch.float32, scale
    args.max_ctas = torch.cuda.get_device_properties(q.device).multi_processor_count
    for i, (k, v, offset) in enumerate(zip(keys, values, k_offsets, strict=True)):
        assert k.shape == v.shape == (batch, k.shape[1], args.kv_heads, HEAD_DIM)
        assert k.dtype == v.dtype == q.dtype
        args.k[i], args.v[i], args.lengths[i], args.k_offsets[i] = k.data_ptr(), v.data_ptr(), k.shape[1], offset
        args.k_strides[i][:], args.v_strides[i][:] = k.stride()[:3], v.stride()[:3]
    for i, (row, n, offset) in enumerate(triples):
        args.chunk_rows[i], args.chunk_lengths[i], args.q_offsets[i] = row, n, offset
    library = load_sm90("attention512")
    assert library.attention512_args_size() == ctypes.sizeof(_Args)
    code = library.attention512_forward(ctypes.byref(args))
    if code:
        raise RuntimeError(f"attention512 failed with CUDA error {code} (10000 + n: no tensor map, driver error n)")


def _outputs(q: Tensor, out_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, dtype=out_dtype or q.dtype, memory_format=torch.contiguous_format)
    return out, _lse(q)


def _lse(q: Tensor) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


def _aligned(tensor: Tensor) -> Tensor:
    strides = tensor.stride()
    if strides[3] == 1 and tensor.data_ptr() % 16 == 0 and not any(s % _ALIGNMENT for s in strides[:3]):
        return tensor
    return tensor.contiguous()
