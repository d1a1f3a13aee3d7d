"""Which layouts are planned: every way to use the ranks, with as many micro-batches in flight as may pay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ds_ring.config import RunConfig
from ds_ring.model_dims import ModelDims
from ds_ring.parallel.topology import Axis
from ds_ring.planning.cards import Card
from ds_ring.planning.memory_estimate import in_flight
from ds_ring.planning.placement import placement
from ds_ring.planning.transfer_time import pulled

IN_FLIGHT = (4, 8, 16)
"""Micro-batches that may go through a layer together, instead of the two that are configured by default."""
SHARING: tuple[Axis, ...] = ("ring", "ulysses")


def degrees(ranks: int, dims: ModelDims) -> Iterator[dict[str, Any]]:
    """Every way to use ``ranks`` ranks: replicas of ring x Ulysses or of pipeline x tensor parallel ranks."""
    ones = {"auto": False, "dp_size": 1, "ring_degree": 1, "ulysses_degree": 1, "tp_size": 1, "pp_size": 1}
    for dp in _divisors(ranks):
        share = ranks // dp
        for inner in _divisors(share):
            outer = share // inner
            yield {**ones, "dp_size": dp, "ring_degree": outer, "ulysses_degree": inner}
            if share > 1 and outer <= dims.num_layers:
                yield {**ones, "dp_size": dp, "pp_size": outer, "tp_size": inner}


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def stays_inside(config: RunConfig, card: Card) -> bool:
    """Whether the axes that talk within a layer, and wait for it, are inside hosts."""
    axes: tuple[Axis, ...] = ("ulysses", "tp")
    return not any(placement(config.topology, axis, card.per_host).leaves_host for axis in axes)


def pulls(config: RunConfig, per_host: int) -> bool:
    """Whether a copy engine serves one of the axes that share sequences: micro-batches then go in flight, also beside
    NCCL on the other axis (``Mesh.overlaps``)."""
    return any(config.topology.size(axis) > 1 and pulled(config, axis, per_host) for axis in SHARING)


def with_lanes(config: RunConfig, card: Card) -> list[RunConfig]:
    """``config``, and with more micro-batches in flight: two where layers are cut, which ``interleave=auto`` does
    not do; more than two where copy engines serve all axes, there are as many, and links may sleep meanwhile."""
    t, ring, micro = config.topology, config.ring, config.largest_micro_batch
    if ring.interleave != "auto":
        return [config]
    if t.tp > 1:
        overlaps = t.pp == 1 and ring.fusion == "auto"
        return [config, RunConfig.load(config, interleave="on")] if overlaps else [config]
    all_pulled = all(t.size(axis) == 1 or pulled(config, axis, card.per_host) for axis in SHARING)
    if not all_pulled or ring.in_flight > 2 or in_flight(config, micro) == 1:
        return [config]
    possible = [lanes for lanes in IN_FLIGHT if lanes <= config.micro_batches(micro)]
    return [config, *(RunConfig.load(config, in_flight=lanes) for lanes in possible)]
