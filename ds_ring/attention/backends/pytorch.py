"""Attention kernels that ship with PyTorch and return the log-sum-exp. GPU only, fp16 and bf16."""

# Shapes: B batch, L queries, S keys, H query heads, K key/value heads, D head_dim. Causal masks, where nothing else is
# said, are aligned to the last query and the last key: query i sees keys 0 .. S - L + i.
import torch
from torch import Tensor

FLASH_MAX_HEAD_DIM = 256
_CAUSAL_FROM_BOTTOM_RIGHT = 2  # torch/csrc: CausalFromBottomRight, the last query sees the last key
_CUDNN_ALIGNMENT = 8
"""Strides in elements; base addresses then are multiples of 16 bytes."""


def flash(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """FlashAttention-2: head_dim <= 256; GQA without copies; causal masks are aligned to the last key."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=scale
    )
    return out, lse


def cudnn(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """cuDNN's flash attention: head_dim a multiple of 8, up to 128 (on Hopper 256), more than one key; GQA without
    copies. A causal mask is aligned to the *first* key. cuDNN plans anew for every shape and stride it has not met,
    which costs the first call of each in a thread."""
    q, k, v = (_aligned(t).transpose(1, 2) for t in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )
    # [B, H, L, 1], as cuDNN keeps its statistics; other releases of PyTorch have given [B, H, L].
    return out.transpose(1, 2), lse.reshape(q.shape[:3]).float()


def _aligned(tensor: Tensor) -> Tensor:
    if tensor.data_ptr() % 16 == 0 and not any(stride % _CUDNN_ALIGNMENT for stride in tensor.stride()[:3]):
        return tensor
    return tensor.contiguous()


def memory_efficient(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """CUTLASS memory-efficient attention: any head_dim, head_dim 512 among them; repeats K/V heads for GQA."""
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
    out, lse, *_ = torch.ops.aten._efficient_attention_forward(
        q, k, v, None, None, None, None, None, 0.0,
        _CAUSAL_FROM_BOTTOM_RIGHT if causal else 0, compute_log_sumexp=True, scale=scale,
    )  # fmt: skip
    return out, lse[:, :, : q.shape[1]]  # the kernel pads its rows to a multiple of 32
