"""Our Triton attention kernel on a GPU at given tile sizes, without trials: each variant compiles once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch

from ds_ring.kernels import triton_attention


@cache
def usual_tile(device: torch.device, dtype: torch.dtype, block_d: int, aligned: bool):
    """Of 64 queries where there are such, by TMA where possible, and of those the last, which needs least memory."""
    from ds_ring.kernels.triton_attention_tiles import suitable_configs

    arguments = {"q": torch.empty(0, device=device, dtype=dtype), "queries_bucket": 64}
    suitable = suitable_configs(None, arguments, BLOCK_D=block_d, ALIGNED=aligned)
    tall = [config for config in suitable if config.kwargs["BLOCK_M"] == 64]
    return sorted(tall or suitable, key=lambda config: config.kwargs["USE_TMA"])[-1]


@contextmanager
def pinned_tiles(tile: Callable = usual_tile) -> Iterator[None]:
    """Launch with the tile size that ``tile(device, dtype, padded head size, aligned)`` gives.

    What is compiled then follows from head size, dtypes, features and alignment alone. Trials compile up to 14 tile
    sizes, a second or two each, for every combination of those and of lengths.
    """
    if triton_attention.unavailable(torch.device("cuda")) is not None:
        yield
        return
    from ds_ring.kernels import triton_attention_kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_attention_kernel, "tuned_forward", _Pinned(tile))
        yield


class _Pinned:
    """Launches as the autotuner does."""

    def __init__(self, tile: Callable) -> None:
        self.tile = tile

    def __getitem__(self, grid):
        from ds_ring.kernels.triton_attention_kernel import forward

        def launch(q, *arguments, **meta):
            tile = self.tile(q.device, q.dtype, meta["BLOCK_D"], meta["ALIGNED"])
            return forward[grid](q, *arguments, **meta, **tile.all_kwargs())

        return launch
