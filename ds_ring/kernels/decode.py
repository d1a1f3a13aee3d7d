"""``torch.ops.ds_ring.decode_attention``: few queries against a cache of keys, in Triton (``decode_kernel.py``).

Every query and every key has a position, and visibility follows from those. So a cache may be filled in any order and
have empty slots. To import this module, Triton is not needed.
"""

# Shapes: B batch, L queries, S keys, H query heads, K key/value heads, D head_dim.
import torch
from torch import Tensor

from ds_ring.kernels import triton_attention

MAX_HEAD_DIM = triton_attention.MAX_HEAD_DIM
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_WINDOW = 1 << 30
"""A window of this many hides nothing: positions are below it, and differences of the two fit 32 bits."""
_MAX_TILE = 128
"""Keys of the kernel's largest tile: offsets inside a tile are 32-bit numbers."""

unavailable = triton_attention.unavailable


def attention(
    q_BLHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    *,
    q_positions_BL: Tensor,
    k_positions_BS: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention by positions, the keys split over enough programs to fill the GPU.

    How the keys are split depends on shapes and the GPU alone. So a call makes the same launches whatever the tensors
    hold, and gives the same bits when repeated. It can be captured in a CUDA graph once a call of the same shapes and
    strides has compiled the kernels. Ranges of keys that no query sees are not read.

    Args:
        q_BLHD, k_BSKD, v_BSKD: fp16, bf16 or fp32, all alike; any strides (a last dimension that is not contiguous
            costs a copy); H is a multiple of K (GQA, MQA); D at most 512.
        q_positions_BL, k_positions_BS: int32, below 2**30 for every key that some query sees. Key j of sequence b is
            visible from query i when ``k_positions[b, j] <= q_positions[b, i]`` and, with a window,
            ``k_positions[b, j] > q_positions[b, i] - window``.
        scale: factor on the scores, positive.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        out_dtype: None for q's.

    Returns:
        out [B, L, H, D] in out_dtype, and lse [B, H, L], fp32, natural logarithm, of the scaled scores; both
        contiguous. A query that sees no key: 0 and -inf. A key that no query sees may hold anything, NaN included; a
        NaN among the values of a key may reach all queries near one that sees it.

    Raises:
        ValueError: shapes or dtypes do not fit together, or a scale is not positive.
    """
    return decode_attention(q_BLHD, k_BSKD, v_BSKD, q_positions_BL, k_positions_BS, scale, window, softcap, out_dtype)


@torch.library.custom_op("ds_ring::decode_attention", mutates_args=())
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor,
    k_positions: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """As ``attention``."""
    _check(q, k, v, q_positions, k_positions, scale, softcap)
    out, lse = _outputs(q, out_dtype)
    if out.numel() == 0:
        return out, lse
    if k.shape[1] == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    from ds_ring.kernels import decode_kernel

    decode_kernel.launch(
        _addressable(q), _addressable(k), _addressable(v), q_positions, k_positions, out, lse,
        scale=scale, window=None if window is None else min(window, _MAX_WINDOW), softcap=softcap,
    )  # fmt: skip
    return out, lse


@decode_attention.register_fake
def _(
    q: Tensor,
    k: object,
    v: object,
    q_positions: object,
    k_positions: object,
    scale: object,
    window: object,
    softcap: object,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    return _outputs(q, out_dtype)


def _check(
    q: Tensor, k: Tensor, v: Tensor, q_positions: Tensor, k_positions: Tensor, scale: float, softcap: float | None
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
    if q_positions.shape != (batch, n_queries) or k_positions.shape != (batch, k.shape[1]):
        raise ValueError(
            f"positions {list(q_positions.shape)} and {list(k_positions.shape)} for q {list(q.shape)} and k "
            f"{list(k.shape)}"
        )
    if not q_positions.dtype == k_positions.dtype == torch.int32:
        raise ValueError(f"positions are {q_positions.dtype} and {k_positions.dtype}, not int32")
    if scale <= 0 or (softcap is not None and softcap <= 0):
        raise ValueError(f"scale {scale} and softcap {softcap} have to be positive")


def _outputs(q: Tensor, out_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, dtype=out_dtype, memory_format=torch.contiguous_format)
    return out, q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


def _addressable(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy where its last dimension is not contiguous or its tokens are too far apart for one tile."""
    if tensor.stride(3) == 1 and tensor.stride(1) * _MAX_TILE < 2**31:
        return tensor
    return tensor.contiguous()
