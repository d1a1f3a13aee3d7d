"""Which back-end computes a block: by device, dtype, head size, what the model asks, and the block's shape.

What serves whom, first to last; one that cannot run or fails its self-test is left out with a warning:

- head_dim 512: attention512 (Hopper), Triton, memory-efficient, eager;
- multiples of 8 up to 256: cuDNN where ``cudnn_pays``, FlashAttention-2, Triton, eager;
- other head sizes: Triton, memory-efficient (multiples of 8), eager;
- sliding windows and soft-capping, any head size: Triton, eager;
- CPUs, and fp32 on GPUs (nothing else is as exact): eager.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from ds_ring.attention.backends.base import ATTENTION512, CUDNN, EAGER, FLASH, MEMORY_EFFICIENT, TRITON, Backend
from ds_ring.attention.backends.pytorch import FLASH_MAX_HEAD_DIM
from ds_ring.attention.backends.selftest import self_test
from ds_ring.attention.spec import BlockSpec
from ds_ring.kernels.attention512 import HEAD_DIM as HOPPER_HEAD_DIM

log = logging.getLogger("ds_ring")

# Measured at head_dim 128 on an H100: benchmarks/results/attention_h100_backends.json.
CUDNN_QUERIES, CUDNN_KEYS = 512, 512
"""Smaller blocks go to FlashAttention-2: at 512 x 512 cuDNN is 1.6 times as fast, at 256 x 256 it is slower. It also
plans anew for each shape it meets, and takes no single key."""
CUDNN_AHEAD = 2048
"""Keys that all queries of a causal block see, from which on cuDNN's two calls and their merge beat one call of
FlashAttention-2: by 4 % behind 2048, by 25 % behind 4096; behind 1024 they lose 16 %."""


def select_backend(q_BLHD: Tensor, n_keys: int, block: BlockSpec) -> Backend:
    """The back-end for queries like ``q_BLHD`` against ``n_keys`` keys."""
    device, dtype, head_dim = q_BLHD.device, q_BLHD.dtype, q_BLHD.shape[3]
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return EAGER
    windowed, capped = block.attention.window is not None, block.attention.softcap is not None
    for backend in _candidates(device, head_dim, q_BLHD.shape[1], n_keys, block):
        if usable(backend, device, dtype, head_dim, windowed, capped):
            return backend
    return EAGER


def _candidates(
    device: torch.device, head_dim: int, n_queries: int, n_keys: int, block: BlockSpec
) -> Iterator[Backend]:
    if not block.attention.plain:
        yield TRITON
        return
    if head_dim % 8 == 0 and head_dim <= FLASH_MAX_HEAD_DIM:
        if cudnn_pays(device, head_dim, n_queries, n_keys, block):
            yield CUDNN
        yield FLASH
    if head_dim == HOPPER_HEAD_DIM:
        yield ATTENTION512
    yield TRITON
    if head_dim % 8 == 0 and head_dim > FLASH_MAX_HEAD_DIM:
        yield MEMORY_EFFICIENT


def cudnn_pays(device: torch.device, head_dim: int, n_queries: int, n_keys: int, block: BlockSpec) -> bool:
    """Whether cuDNN beats FlashAttention-2 on this block: ``benchmarks/results/attention*.json``, H200 and H100.

    It needs a GPU for which cuDNN has kernels of its own generation (Hopper, data-centre Blackwell), and either a full
    block or a causal one that is aligned to its keys; other causal blocks would go in pieces of any size.
    """
    generation, _ = _capability(device)
    if generation not in (9, 10) or head_dim > _cudnn_max_head_dim(device):
        return False
    if n_queries < CUDNN_QUERIES or n_keys < CUDNN_KEYS:
        return False
    if not block.causal or block.shift >= n_keys:
        return True
    if block.shift < 0 or n_queries + block.shift > n_keys:
        return False
    return block.shift == 0 or block.shift >= CUDNN_AHEAD


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _cudnn_max_head_dim(device: torch.device) -> int:
    """What PyTorch lets through to cuDNN in ``sdp_utils.cpp``, ``check_cudnn_tensor_shapes``; 0: too old or missing."""
    version = torch.backends.cudnn.version() or 0
    if version < 90000:
        return 0
    return 256 if version >= 91000 and _capability(device) == (9, 0) else 128


@cache
def usable(
    backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int, windowed: bool, capped: bool
) -> bool:
    """Whether ``backend`` can run and passes its self-test; if not, a warning says why, once for each such case."""
    try:
        reason = backend.unusable(device)
        if reason is None:
            self_test(backend, device, dtype, head_dim, windowed, capped)
    except torch.OutOfMemoryError:
        raise  # says nothing about the back-end
    except Exception as error:  # whatever a library or a compiler raises where it has no kernel
        reason = str(error) or type(error).__name__
    if reason is not None:
        log.warning("attention at head_dim %d in %s goes without %s: %s", head_dim, dtype, backend.name, reason)
    return reason is None
