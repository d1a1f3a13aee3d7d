"""``torch.ops.ds_ring.triton_attention``: attention of one block, in Triton (``triton_attention_kernel.py``).

It takes any head size up to 512, any lengths and offsets, sliding windows and softcap, on any GPU that Triton compiles
for. To import this module, Triton is not needed.
"""

# Shapes: B batch, L queries, S keys, H query heads, K key/value heads, D head_dim.
import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

MAX_HEAD_DIM = 512
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_TILE = 128
"""Queries or keys of the kernel's largest tile: offsets inside a tile are 32-bit numbers."""


@cache
def unavailable(device: torch.device) -> str | None:
    """Why this kernel cannot be used on ``device``; None where it can."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda":
        old = torch.version.cuda is not None and torch.cuda.get_device_capability(device) < (8, 0)
        return f"{torch.cuda.get_device_name(device)} is older than Ampere" if old else None
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return None if interpreted else f"Triton does not compile for {device.type} (TRITON_INTERPRET=1 interprets)"


def attention(
    q_BLHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    *,
    scale: float,
    causal: bool,
    q_offset: int,
    k_offset: int,
    window: int | None = None,
    softcap: float | None = None,
    previous: tuple[Tensor, Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one block, continued from the result over earlier blocks where there is one.

    The first call for a combination of head size, dtypes, features and length bucket tries several tile sizes. The
    fastest is kept, also on disk for later processes. Neither these trials nor compilation can happen while a CUDA
    graph is captured: make a call of the same shapes and strides before.

    Args:
        q_BLHD, k_BSKD, v_BSKD: fp16, bf16 or fp32, all alike; any strides (a last dimension that is not contiguous
            costs a copy); H is a multiple of K (GQA, MQA); D at most 512.
        scale: factor on the scores, positive.
        causal: key j is visible from query i when ``k_offset + j <= q_offset + i`` and, with a window,
            ``q_offset + i - window < k_offset + j``; otherwise every key is visible from every query.
        q_offset, k_offset: global positions of the first query and the first key.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        previous: (out [B, L, H, D] of any float dtype, lse [B, H, L] fp32) over other keys, not modified; the result
            is over those and this block's keys. Where lse is -inf, out may hold anything.
        out_dtype: by default that of q, or fp32 when the previous out is fp32.

    Returns:
        out [B, L, H, D] in out_dtype, and lse [B, H, L], fp32, natural logarithm, of the scaled scores; both
        contiguous. A query that has seen no key: 0 and -inf. A query that sees a NaN: NaN; a NaN among the values may
        also reach neighbouring queries that do not see it.

    Raises:
        ValueError: shapes or dtypes do not fit together, or a scale is not positive.
        RuntimeError: a CUDA graph is being captured, and the tile size is not chosen yet.
    """
    previous_out, previous_lse = (None, None) if previous is None else previous
    return triton_attention(
        q_BLHD,
        k_BSKD,
        v_BSKD,
        scale,
        causal,
        q_offset - k_offset,
        window,
        softcap,
        previous_out,
        previous_lse,
        out_dtype,
    )


@torch.library.custom_op("ds_ring::triton_attention", mutates_args=())
def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    shift: int,
    window: int | None,
    softcap: float | None,
    previous_out: Tensor | None,
    previous_lse: Tensor | None,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """``attention`` with ``shift = q_offset - k_offset``."""
    _check(q, k, v, scale, softcap, previous_out, previous_lse)
    out, lse = _outputs(q, previous_out, out_dtype)
    if out.numel() == 0:
        return out, lse
    # Visible are keys j with i + behind < j <= i + ahead: numbers that fit 32 bits whatever the positions are. A bound
    # that hides nothing is None.
    n_queries, n_keys = q.shape[1], k.shape[1]
    ahead = shift if causal and shift < n_keys - 1 else None
    behind = shift - window if causal and window is not None and shift + n_queries > window else None
    nothing_visible = (
        n_keys == 0
        or (ahead is not None and n_queries - 1 + ahead < 0)
        or (behind is not None and (behind >= n_keys - 1 or behind >= shift))
    )
    if nothing_visible:
        _fill_unseen(out, lse, previous_out, previous_lse)
        return out, lse
    from ds_ring.kernels import triton_attention_kernel

    previous = None
    if previous_out is not None and previous_lse is not None:
        previous = (
            _addressable(previous_out),
            previous_lse if previous_lse.stride(2) == 1 else previous_lse.contiguous(),
        )
    q, k, v = _addressable(q), _addressable(k), _addressable(v)
    triton_attention_kernel.launch(
        q, k, v, out, lse, previous, scale=scale, softcap=softcap, ahead=ahead, behind=behind
    )
    return out, lse


@triton_attention.register_fake
def _(
    q: Tensor,
    k: object,
    v: object,
    scale: object,
    causal: object,
    shift: object,
    window: object,
    softcap: object,
    previous_out: Tensor | None,
    previous_lse: object,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    return _outputs(q, previous_out, out_dtype)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float | None,
    previous_out: Tensor | None,
    previous_lse: Tensor | None,
) -> None:
    batch, n_queries, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    alike = k.shape == v.shape and (k.shape[0], k.shape[3]) == (batch, head_dim)
    if not alike or kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit together")
    if not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim {head_dim} is not in 1 .. {MAX_HEAD_DIM}")
    if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, not all fp16, bf16 or fp32")
    if scale <= 0 or (softcap is not None and softcap <= 0):
        raise ValueError(f"scale {scale} and softcap {softcap} have to be positive")
    if (previous_out is None) != (previous_lse is None):
        raise ValueError("a previous result is an out and an lse")
    if previous_out is not None and previous_lse is not None:
        if previous_out.shape != q.shape or previous_lse.shape != (batch, heads, n_queries):
            raise ValueError(f"previous {list(previous_out.shape)}, {list(previous_lse.shape)} for q {list(q.shape)}")
        if not previous_out.is_floating_point() or previous_lse.dtype != torch.float32:
            raise ValueError(f"previous out and lse are {previous_out.dtype} and {previous_lse.dtype}")


def _outputs(q: Tensor, previous_out: Tensor | None, out_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    if out_dtype is None:
        out_dtype = torch.float32 if previous_out is not None and previous_out.dtype == torch.float32 else q.dtype
    out = torch.empty_like(q, dtype=out_dtype, memory_format=torch.contiguous_format)
    return out, q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


def _fill_unseen(out: Tensor, lse: Tensor, previous_out: Tensor | None, previous_lse: Tensor | None) -> None:
    """Write the result of a block that no query sees: the previous result, or 0 and -inf."""
    if previous_out is None or previous_lse is None:
        out.zero_()
        lse.fill_(-torch.inf)
    else:
        out.copy_(previous_out.masked_fill(torch.isneginf(previous_lse).transpose(1, 2).unsqueeze(-1), 0.0))
        lse.copy_(previous_lse)


def _addressable(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy where its last dimension is not contiguous or its tokens are too far apart for one tile."""
    if tensor.stride(3) == 1 and tensor.stride(1) * _MAX_TILE < 2**31:
        return tensor
    return tensor.contiguous()
