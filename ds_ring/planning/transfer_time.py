"""Seconds that a forward's transfers take with nothing beside them, in a host and between hosts.

Each axis has one transport for all its groups (``transport/select.py``): copy engines where every group is in a host,
else NCCL, also for what stays in a host. AutoTP's all-reduces are NCCL's everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_ring.config import RunConfig
from ds_ring.model_dims import ModelDims
from ds_ring.parallel.topology import Axis
from ds_ring.planning.cards import Card
from ds_ring.planning.comm_volume import Sent
from ds_ring.planning.placement import placement


@dataclass(frozen=True)
class Transfers:
    """Of one forward, on the busiest rank.

    Attributes:
        near, far: seconds in a host and between hosts, of all but a pipeline's hand-overs. NCCL exchanges with all
            ranks of a group at once: of an axis that leaves hosts only what takes longer counts.
        by_copy_engine, by_nccl: the same, by what moves them.
        links: seconds in which links in a host are busy, of all axes.
        pulled_by_ring: seconds that a ring's keys and values take by copy engine.
        handed_near, handed_far: seconds of a pipeline's hand-overs, of one stage.
        bursts: how often links in a host have something to do, with computation in between.
    """

    near: float = 0.0
    far: float = 0.0
    by_copy_engine: float = 0.0
    by_nccl: float = 0.0
    pulled_by_ring: float = 0.0
    handed_near: float = 0.0
    handed_far: float = 0.0
    links: float = 0.0
    bursts: int = 0


def pulled(config: RunConfig, axis: Axis, per_host: int) -> bool:
    """Whether copy engines serve ``axis``."""
    served = axis in ("ring", "ulysses", "pp") and config.ring.transport != "process_group"
    return served and not placement(config.topology, axis, per_host).leaves_host


def transfers(config: RunConfig, dims: ModelDims, sent: dict[Axis, Sent], card: Card) -> Transfers:
    """What ``sent`` takes, over all micro-batches of a rank."""
    t, steps = config.topology, config.micro_batches(config.largest_micro_batch)
    near = far = by_copy_engine = by_nccl = pulled_by_ring = links = 0.0
    handed = 0.0, 0.0
    bursts = 0
    for axis, one in sent.items():
        engine = pulled(config, axis, card.per_host)
        times = {"ring": t.ring - 1, "ulysses": 2, "tp": 2, "pp": 1}[axis]
        messages = steps * times * (1 if axis == "pp" else dims.num_layers / t.pp)
        inside = _near_seconds(one, axis, t.size(axis), engine, messages, card)
        outside = _far_seconds(one, messages, card)
        links += inside
        if inside:
            bursts += round(steps if axis == "pp" else steps * dims.num_layers * (2 if axis == "tp" else 1) / t.pp)
        if axis == "pp":
            handed = inside, outside
            continue
        if outside:
            inside, outside = (inside, 0.0) if inside > outside else (0.0, outside)
        near, far = near + inside, far + outside
        by_copy_engine += inside if engine else 0.0
        by_nccl += 0.0 if engine else inside + outside
        pulled_by_ring += inside if engine and axis == "ring" else 0.0
    return Transfers(near, far, by_copy_engine, by_nccl, pulled_by_ring, *handed, links, bursts)


def _near_seconds(sent: Sent, axis: Axis, ranks: int, engine: bool, messages: float, card: Card) -> float:
    if not sent.most_near:
        return 0.0
    rates = card.rates
    if engine:
        reached = 1.0 if ranks == 2 or axis == "pp" else rates.copies_among_many
        start = rates.message_s
    else:
        reached = rates.all_reduce_of_two if ranks == 2 else rates.all_reduce_of_many
        start = rates.all_reduce_start_s
    return sent.most_near / (card.link_bytes * reached) + messages * start


def _far_seconds(sent: Sent, messages: float, card: Card) -> float:
    """Ranks of a host share its adapters, each of which goes both ways at once."""
    if not sent.most_far:
        return 0.0
    rate = card.network_bytes * min(1.0, card.adapters) * card.rates.network_reached
    return sent.most_far / rate + messages * card.rates.network_message_s
