"""Whether a generation's key/value cache can be held at all, before any work."""

from __future__ import annotations

import torch

from ds_ring.config import RunConfig
from ds_ring.errors import InputError
from ds_ring.model_dims import ModelDims
from ds_ring.planning.cards import card_of
from ds_ring.planning.memory_estimate import cache_bytes
from ds_ring.utils.numbers import size


def check_cache_fits(
    run: RunConfig, dims: ModelDims, rows: int, longest: int, new: int, device: torch.device, weight_bytes: int = 0
) -> None:
    """Raise InputError where the whole memory of the fullest rank is less than its weights and the cache at its end.

    What a forward needs besides is left out, so that nothing is refused that could run to its last token.

    Args:
        rows: of the batch, over all replicas.
        longest: tokens of the longest row's input.
        new: tokens that may be generated.
        weight_bytes: of this rank's weights, as far as they are known.
    """
    own, length, whole = -(-rows // run.parallel.dp_size), longest + new, card_of(device).memory_gib * 2**30
    cache = cache_bytes(run, dims, own, length)
    if cache + weight_bytes > whole:
        beside = f" beside {size(weight_bytes)} of weights" if weight_bytes else ""
        raise InputError(
            f"{longest} tokens of input + max_new_tokens={new} = {length} in {own} row(s) take {size(cache)} of cache "
            f"on a rank{beside}, and it has {size(whole)}; lower max_new_tokens, give fewer or shorter rows, or share "
            f"them among more ranks"
        )
