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
from ds_ring.transport.select import PULLED_AXES


@dataclass(frozen=True)
class AxisTime:
    """Of one axis in one forward, on the busiest rank and in the busier direction.

    Attributes:
        pulls: whether copy engines serve it.
        near, far: seconds in a host and between hosts.
        bursts: how often its links in a host have something to do, with computation in between.
    """

    axis: Axis
    pulls: bool
    near: float
    far: float
    bursts: int

    @property
    def near_wait(self) -> float:
        """Seconds in a host that a rank waits for where nothing hides them. NCCL exchanges with all ranks of a group at
        once: of an axis that leaves hosts only what takes longer counts."""
        return self.near if self.near >= self.far else 0.0

    @property
    def far_wait(self) -> float:
        return self.far if self.far > self.near else 0.0


@dataclass(frozen=True)
class Transfers:
    """Of all axes with several ranks. A pipeline's hand-overs are apart: they are between layers' work."""

    axes: tuple[AxisTime, ...]

    @property
    def near(self) -> float:
        return sum(one.near_wait for one in self._in_layers)

    @property
    def far(self) -> float:
        return sum(one.far_wait for one in self._in_layers)

    @property
    def by_copy_engine(self) -> float:
        return sum(one.near for one in self._in_layers if one.pulls)

    @property
    def by_nccl(self) -> float:
        return sum(max(one.near, one.far) for one in self._in_layers if not one.pulls)

    @property
    def pulled_by_ring(self) -> float:
        """Seconds that a ring's keys and values take by copy engine."""
        return sum(one.near for one in self._in_layers if one.pulls and one.axis == "ring")

    @property
    def handed(self) -> AxisTime:
        """A pipeline's hand-overs, of one stage."""
        return next(one for one in self.axes if one.axis == "pp")

    @property
    def links(self) -> float:
        """Seconds in which links in a host are busy."""
        return sum(one.near for one in self.axes)

    @property
    def adapters(self) -> float:
        """Seconds in which a rank's adapter is busy."""
        return sum(one.far for one in self.axes)

    @property
    def bursts(self) -> int:
        return sum(one.bursts for one in self.axes)

    @property
    def _in_layers(self) -> list[AxisTime]:
        return [one for one in self.axes if one.axis != "pp"]


def pulled(config: RunConfig, axis: Axis, per_host: int) -> bool:
    """Whether copy engines serve ``axis``."""
    served = axis in PULLED_AXES and config.ring.transport != "process_group"
    return served and not placement(config.topology, axis, per_host).leaves_host


def transfers(config: RunConfig, dims: ModelDims, sent: dict[Axis, Sent], card: Card) -> Transfers:
    """What ``sent`` takes, over all micro-batches of a rank."""
    t, steps = config.topology, config.micro_batches(config.largest_micro_batch)
    layers = steps * dims.num_layers / t.pp
    messages = {"ring": layers * (t.ring - 1), "ulysses": 2 * layers, "tp": 2 * layers, "pp": steps}
    bursts = {"ring": layers, "ulysses": layers, "tp": 2 * layers, "pp": steps}
    found = []
    for axis, one in sent.items():
        pulls = pulled(config, axis, card.per_host)
        near = _near_seconds(one, axis, t.size(axis), pulls, messages[axis], card)
        far = _far_seconds(one, messages[axis], card)
        found.append(AxisTime(axis, pulls, near, far, round(bursts[axis]) if near else 0))
    return Transfers(tuple(found))


def _near_seconds(sent: Sent, axis: Axis, ranks: int, pulls: bool, messages: float, card: Card) -> float:
    if not sent.most_near:
        return 0.0
    rates = card.rates
    if pulls:
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
