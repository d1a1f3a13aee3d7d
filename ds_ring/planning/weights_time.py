"""What it takes to have whole layers where ranks hold the weights between them (``weights/``).

A layer of b bytes, n ranks: each receives b (n - 1) / n from the others, by copy engine, or over the network where a
copy spans hosts; streamed, each first takes b / n from its host. Both go on at the same time, for the next layer while
the present one computes: what is longer than that shows, and so does the first layer of a forward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ds_ring.config import RunConfig
from ds_ring.model_dims import ModelDims
from ds_ring.planning.cards import Card
from ds_ring.planning.memory_estimate import in_flight


@dataclass(frozen=True)
class Fetching:
    """
    Attributes:
        layer_s: seconds of one layer with nothing beside it; 0 where weights are whole.
        layers: how many a forward fetches, micro-batch after micro-batch.
        by_links: whether layers come over links between devices.
        beside: seconds that kernels take longer for a second of it beside them.
    """

    layer_s: float
    layers: int
    by_links: bool
    beside: float

    def shown(self, computed_s: float) -> float:
        """Seconds that show beside so many of computation."""
        return max(0.0, (self.layers - 1) * self.layer_s - computed_s) + self.layer_s

    @property
    def total(self) -> float:
        return self.layers * self.layer_s


def fetching(config: RunConfig, dims: ModelDims, linear_parameters: int, card: Card, pulls: bool) -> Fetching:
    """Of one forward of the configured batch."""
    if config.weights == "whole":
        return Fetching(0.0, 0, False, 0.0)
    ranks, micro = config.topology.weights, config.largest_micro_batch
    layer = linear_parameters / dims.num_layers * config.itemsize
    rate = card.link_bytes * (1.0 if ranks == 2 else card.rates.copies_among_many)
    if ranks > card.per_host:
        rate = card.network_bytes * min(1.0, card.adapters) * card.rates.network_reached
    received = layer * (ranks - 1) / ranks / rate
    streamed = layer / ranks / card.host_bytes if config.weights == "streamed" else 0.0
    rounds = math.ceil(config.micro_batches(micro) / in_flight(config, micro, pulls))
    # Streamed parts travel as messages.
    by_nccl = received / max(received, streamed) if config.weights == "streamed" else 0.0
    beside = card.rates.beside_copies * (1 - by_nccl) + card.rates.beside_nccl * by_nccl
    return Fetching(max(received, streamed), rounds * dims.num_layers, ranks > 1, beside)
