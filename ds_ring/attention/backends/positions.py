"""Attention against a cache: what a query sees goes by the positions of keys, not by where they lie."""

# Shapes: B batch, L queries, S keys, H query heads, K key/value heads, D head_dim.
from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from ds_ring.attention.backends import eager_positions
from ds_ring.attention.backends.selftest import self_test_positions
from ds_ring.attention.spec import AttentionSpec
from ds_ring.kernels import decode

log = logging.getLogger("ds_ring")

EMPTY = 2**30
"""Position of a cache slot that holds no key: beyond every query's."""
BLIND = -1
"""Position of a query that sees no key: padding."""


def grown(positions_BS: Tensor, slots: int) -> Tensor:
    """[B, slots], the new ones ``EMPTY``."""
    more_BS = positions_BS.new_full((positions_BS.shape[0], slots), EMPTY)
    more_BS[:, : positions_BS.shape[1]] = positions_BS
    return more_BS


def attend_positions(
    q_BLHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    *,
    q_positions_BL: Tensor,
    k_positions_BS: Tensor,
    spec: AttentionSpec,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """On GPUs our Triton kernel, on CPUs and for fp32 plain PyTorch. Once a head size, dtype and feature has had its
    first call, which tests the kernel, nothing asks the device what a tensor holds: calls can be captured in a graph.

    Args:
        q_BLHD, k_BSKD, v_BSKD: any strides with a contiguous last dimension; H is a multiple of K (GQA, MQA). A slot
            that no query sees may hold anything, NaN included.
        q_positions_BL, k_positions_BS: int32. Key j of row b is visible from query i when
            ``k_positions[b, j] <= q_positions[b, i]`` and, with a window, ``> q_positions[b, i] - window``.
        out_dtype: None for q's.

    Returns:
        out [B, L, H, D], and lse [B, H, L], fp32, natural logarithm, of the scaled scores. A row that sees no key
        gives out 0 and lse -inf.
    """
    if uses_kernel(q_BLHD, spec):
        return decode.attention(
            q_BLHD, k_BSKD, v_BSKD, q_positions_BL=q_positions_BL, k_positions_BS=k_positions_BS,
            scale=spec.scale, window=spec.window, softcap=spec.softcap, out_dtype=out_dtype,
        )  # fmt: skip
    return eager_positions.attention(
        q_BLHD, k_BSKD, v_BSKD,
        q_positions_BL=q_positions_BL, k_positions_BS=k_positions_BS, spec=spec, out_dtype=out_dtype,
    )  # fmt: skip


def uses_kernel(q_BLHD: Tensor, spec: AttentionSpec) -> bool:
    """Whether queries like ``q_BLHD`` go to the Triton kernel. In fp32 it has no tensor cores to be faster with."""
    device, dtype, head_dim = q_BLHD.device, q_BLHD.dtype, q_BLHD.shape[3]
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    return kernel_usable(device, dtype, head_dim, spec.window is not None, spec.softcap is not None)


@cache
def kernel_usable(device: torch.device, dtype: torch.dtype, head_dim: int, windowed: bool, capped: bool) -> bool:
    """Whether the decode kernel can run and passes its self-test; if not, a warning says why, once for each case.

    Raises:
        RuntimeError: during the capture of a CUDA graph, when the answer is not known yet.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"attention by positions at head_dim {head_dim} in {dtype} has not been tested on {device} yet, and cannot "
            f"be while a CUDA graph is captured: call it once before"
        )
    try:
        reason = decode.unavailable(device)
        if reason is None:
            self_test_positions(decode.attention, device, dtype, head_dim, windowed, capped)
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernel
    except Exception as error:  # whatever a compiler raises where it has no kernel
        reason = str(error) or type(error).__name__
    if reason is not None:
        log.warning("attention by positions at head_dim %d in %s goes without our kernel: %s", head_dim, dtype, reason)
    return reason is None
