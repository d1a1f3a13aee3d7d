"""Whether ranks that share a sequence decode with slices of the weights, and which."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel

from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError, UnsupportedModelError
from ds_ring.hf.tensor_slices import Slice, slices_of
from ds_ring.model_dims import ModelDims
from ds_ring.planning.cards import Card, card_of
from ds_ring.transport.base import Transport
from ds_ring.weights.sharded import ShardedWeights

log = logging.getLogger("ds_ring")

COLLECTIVES_A_LAYER = 3
"""That slices add to a step: queries, keys and values gathered, and the sums behind the attention and the MLP."""


def decode_slices(
    model: PreTrainedModel,
    config: RunConfig,
    dims: ModelDims,
    sp: Transport,
    device: torch.device,
    weights: ShardedWeights | None = None,
) -> dict[str, Slice] | None:
    """This rank's slices, as ``parallel.decode`` wants it; None: every rank computes with whole weights. Collective.

    Args:
        weights: where ranks hold them between them. What they hold are the slices; without these, each step fetches
            every layer.

    Raises:
        ConfigError, UnsupportedModelError: slices are asked for, and cannot be.
    """
    wanted = config.parallel.decode
    if sp.size == 1 or wanted == "whole":
        return None
    if weights is not None and weights.transport.size < sp.size:
        if wanted == "sliced":
            raise ConfigError(
                f"decode=sliced needs weights_degree={sp.size}, all ranks that share a sequence, not "
                f"{weights.transport.size}"
            )
        log.info("every rank decodes with whole weights, fetched for each token: other ranks hold a copy of their own")
        return None
    held = (lambda name: None) if weights is None else weights.own
    if wanted == "sliced":
        return slices_of(model, sp.rank, sp.size, sp, held)
    if dims.unlike_layers:
        return None
    try:
        slices = slices_of(model, sp.rank, sp.size, sp, held)
    except (ConfigError, UnsupportedModelError) as reason:
        fetched = "" if weights is None else ", fetched for each token"
        log.info("every rank decodes with whole weights%s: %s", fetched, reason)
        return None
    if weights is not None:
        return slices
    read = sum(part.weight.nbytes for part in slices.values()) * sp.size
    # Of cards that differ, each rank would decide by its own.
    return slices if all(sp.all_gather_objects(pays(read, dims.num_layers, sp.size, card_of(device)))) else None


def pays(weight_bytes: int, num_layers: int, ranks: int, card: Card) -> bool:
    """Whether reading ``1 / ranks`` of the layers' weights saves more time a step than its collectives take."""
    saved_s = weight_bytes * (1 - 1 / ranks) / card.memory_bytes
    return saved_s > COLLECTIVES_A_LAYER * num_layers * card.collective_s
