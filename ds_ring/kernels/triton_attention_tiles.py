# mypy: ignore-errors
# (Triton has no types.)
"""Tile sizes of the Triton kernel in ``triton_attention_kernel.py``: which ones are tried for a call."""

import torch
import triton

TUNING_LENGTH = 8192
"""A longer block takes the tile size that is fastest on a part of it of this length."""


def config(block_m: int, block_n: int, warps: int, stages: int, v_split: int = 1, use_tma: bool = False):
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "V_SPLIT": v_split, "USE_TMA": use_tma, "STAGES": stages}
    return triton.Config(sizes, num_warps=warps, num_stages=stages)


TILES = {
    64: [(128, 128, 8, 3, 1), (128, 64, 4, 3, 1), (128, 128, 4, 2, 1), (128, 64, 4, 4, 1), (64, 64, 4, 3, 1)],
    128: [(128, 128, 8, 2, 1), (128, 64, 8, 3, 1), (128, 64, 4, 3, 1), (64, 128, 4, 2, 1), (64, 64, 4, 2, 1)],
    256: [(128, 64, 8, 2, 1), (128, 32, 8, 2, 1), (128, 32, 8, 3, 1), (64, 64, 4, 2, 1), (64, 32, 4, 2, 1)],
    512: [(64, 32, 8, 2, 1), (64, 64, 8, 1, 1), (64, 32, 8, 1, 1), (128, 32, 8, 1, 2), (128, 64, 8, 1, 2),
          (128, 16, 8, 2, 2), (64, 32, 4, 2, 2)],
}  # fmt: skip
"""By padded head size, (BLOCK_M, BLOCK_N, warps, stages, V_SPLIT). V_SPLIT 2 halves the accumulator of a program, so
that at head_dim 512 a program can have twice the queries; the scores are then computed twice."""
_SMALL_TILES = [(16, 64, 4, 2, 1), (16, 32, 4, 1, 1)]
"""For few queries and for GPUs with little shared memory."""
_FP32_TILES = [(32, 16, 8, 1, 1), (16, 32, 8, 1, 1), (16, 16, 8, 1, 1)]
"""Without tensor cores every matrix product is unrolled: larger tiles run out of registers."""


def configs(head_dim: int, dtype: torch.dtype = torch.float16) -> list[triton.Config]:
    """The tile sizes to try at a padded head size."""
    if dtype == torch.float32:
        return [config(*tile) for tile in _FP32_TILES]
    tiles = TILES[max(64, head_dim)]
    return [*(config(*tile, use_tma=True) for tile in tiles), *(config(*tile) for tile in tiles + _SMALL_TILES)]


def suitable_configs(_configs: object, arguments: dict, **meta: object) -> list[triton.Config]:
    """The tile sizes to try for one call. Triton calls this exactly when it is about to try them."""
    q = arguments["q"]
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "our Triton attention has no tile size for this head size, dtype and length yet, and cannot try any while "
            "a CUDA graph is captured: call it once before"
        )
    tma = meta["ALIGNED"] and torch.version.cuda is not None and torch.cuda.get_device_capability(q.device) >= (9, 0)
    most_queries = max(64, arguments["queries_bucket"])
    return [
        found
        for found in configs(meta["BLOCK_D"], q.dtype)
        if (tma or not found.kwargs["USE_TMA"]) and found.kwargs["BLOCK_M"] <= most_queries
    ]


def bucket(n: int, most: int = TUNING_LENGTH) -> int:
    """``n`` rounded up to a power of two, 16 to ``most``: lengths with the same bucket share a tile size."""
    return min(max(16, triton.next_power_of_2(n)), most)
