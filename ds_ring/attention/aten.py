"""Attention kernels that ship with PyTorch and return the log-sum-exp. GPU only, fp16 and bf16."""

# Shapes: B batch, L queries, S keys, H query heads, K key/value heads, D head_dim.
import torch
from torch import Tensor

FLASH_MAX_HEAD_DIM = 256
_CAUSAL_FROM_BOTTOM_RIGHT = 2  # torch/csrc: CausalFromBottomRight, the last query sees the last key


def flash(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """FlashAttention-2: head_dim <= 256; GQA without copies; causal masks are aligned to the last key."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=scale
    )
    return out, lse


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
