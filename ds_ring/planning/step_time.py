"""The seconds of one forward, as a sum: what a rank computes, what of its communication shows, and where.

    step = products + attention + memory             what the rank computes, at the clock that its power allows
         + bubble                                     a pipeline's filling and draining
         + waits in hosts + waits between hosts       transfers that nothing hides
         + waits for weights                          layers that are not there in time, where ranks share weights
         + beside transfers                           what transfers cost the kernels beside them
         + links awake                                the power that links take
         - cooler                                     what the clock gains from waits

What hides transfers. Micro-batches in flight: all of them, as far as there is computation. A ring alone: what the
rank's own block takes, by copy engine only. A pipeline: the stage's computation. Nothing hides AutoTP's all-reduces of
one micro-batch, or an all-to-all's. Transfers take as long as those of the busiest rank and direction
(``transfer_time.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ds_ring.config import RunConfig
from ds_ring.model_dims import ModelDims
from ds_ring.planning.candidates import pulls
from ds_ring.planning.cards import Card
from ds_ring.planning.comm_volume import bytes_by_axis
from ds_ring.planning.compute_time import Compute, compute
from ds_ring.planning.memory_estimate import in_flight
from ds_ring.planning.transfer_time import Transfers, transfers
from ds_ring.planning.weights_time import fetching
from ds_ring.utils.numbers import time_unit

TERMS = {
    "products": "products",
    "attention": "attention",
    "memory": "memory",
    "bubble": "bubble",
    "waits_near": "waits in hosts",
    "waits_far": "waits between hosts",
    "weights": "waits for weights",
    "beside": "beside transfers",
    "awake": "links awake",
    "cooler": "cooler",
}


@dataclass(frozen=True)
class StepTime:
    """Terms of a step in seconds, as in ``TERMS``; ``cooler`` is negative."""

    products: float
    attention: float
    memory: float
    bubble: float = 0.0
    waits_near: float = 0.0
    waits_far: float = 0.0
    beside: float = 0.0
    awake: float = 0.0
    cooler: float = 0.0
    weights: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, name) for name in TERMS)

    @property
    def exposed(self) -> float:
        """What a rank would not take that computed as much alone."""
        return self.total - (self.products + self.attention + self.memory)

    def text(self) -> str:
        """The sum in words: ``7.10 s = products 6.21 + attention 0.77 + ...``; terms below a thousandth left out."""
        shown = [(TERMS[n], getattr(self, n)) for n in TERMS if abs(getattr(self, n)) >= 1e-3 * self.total]
        scale, unit = time_unit(self.total)
        first, *rest = (f"{'-' if value < 0 else '+'} {name} {_scaled(abs(value) * scale)}" for name, value in shown)
        return " ".join([f"{_scaled(self.total * scale)} {unit} =", first[2:], *rest])


def _scaled(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def step_time(config: RunConfig, dims: ModelDims, linear_parameters: int, card: Card) -> StepTime:
    """One forward of the configured batch on ``config``'s layout."""
    rows, micro = math.ceil(config.workload.batch_size / config.topology.dp), config.largest_micro_batch
    computed = compute(config, dims, linear_parameters, rows, micro, config.itemsize, card)
    fetched = fetching(config, dims, linear_parameters, card, pulls(config, card.per_host))
    step = _step(config, dims, computed, rows, card)
    if not fetched.layers:
        return step
    awake = _links_awake(fetched.layers, fetched.total, computed.total, card) if fetched.by_links else 0.0
    return replace(
        step,
        weights=fetched.shown(computed.total),
        beside=step.beside + fetched.beside * min(fetched.total, computed.total),
        awake=max(step.awake, awake),
    )


def _step(config: RunConfig, dims: ModelDims, computed: Compute, rows: int, card: Card) -> StepTime:
    """With weights that are there."""
    work, t, micro = config.workload, config.topology, config.largest_micro_batch
    if t.tp * t.pp * t.sp == 1:
        return StepTime(*computed.parts)
    sent = bytes_by_axis(config, dims, t.dp * rows, work.max_length, config.itemsize, card.per_host)
    moved = transfers(config, dims, sent, card)
    lanes = in_flight(config, micro, pulls(config, card.per_host))
    if t.pp > 1:
        return _pipeline(config, computed, moved, card)
    if lanes > 1:
        return _in_flight(config, computed, moved, lanes, card)
    return _one_at_a_time(config, computed, moved, card)


def _in_flight(config: RunConfig, computed: Compute, moved: Transfers, lanes: int, card: Card) -> StepTime:
    """Transfers of one micro-batch under the layers of others. More than two go through each layer together, and leave
    links asleep until the next one."""
    rates, steps = card.rates, config.micro_batches(config.largest_micro_batch)
    bursts = moved.bursts * (math.ceil(steps / lanes) / steps if lanes > 2 else 1)
    beside = rates.beside_copies * moved.by_copy_engine + rates.beside_nccl * moved.by_nccl
    awake = _links_awake(bursts, moved.links, computed.total, card)
    busy = computed.total + beside + awake
    # What takes longer than the computation shows; links in a host and adapters work at the same time.
    near, far = max(0.0, moved.near - busy), max(0.0, moved.far - busy)
    near, far = (near, 0.0) if near > far else (0.0, far)
    return StepTime(*computed.parts, 0.0, near, far, beside, awake)


def _one_at_a_time(config: RunConfig, computed: Compute, moved: Transfers, card: Card) -> StepTime:
    """Each micro-batch's transfers between its layers."""
    hidden = min(moved.pulled_by_ring, computed.attention / config.topology.ring)
    near, far = moved.near - hidden, moved.far
    awake = _links_awake(moved.bursts, moved.links, computed.total, card)
    beside = card.rates.beside_copies * hidden
    cooler = _cooler(near + far, 0.0, computed.total + awake, card)
    return StepTime(*computed.parts, 0.0, near, far, beside, awake, cooler)


def _pipeline(config: RunConfig, computed: Compute, moved: Transfers, card: Card) -> StepTime:
    """A stage's work on all micro-batches, and a bubble: its work on one of them for each other stage. All-reduces in a
    stage are not hidden. Hand-overs are, but for those of the first micro-batch; NCCL's receives take SMs."""
    stages, steps = config.topology.pp, config.micro_batches(config.largest_micro_batch)
    handed = moved.handed
    awake = _links_awake(moved.bursts, moved.links, computed.total, card)
    beside = card.rates.receiving * computed.total if not handed.pulls else 0.0
    busy, waits = computed.total + awake + beside, moved.near + moved.far
    idle = (busy + waits) * (stages - 1) / steps
    cooler = _cooler(waits, idle, busy, card)
    stage = busy + waits + cooler
    bubble = stage * (stages - 1) / steps
    near = moved.near + handed.near * (stages - 1) / steps
    far = moved.far + max(handed.far * (stages - 1) / steps, handed.far - stage)
    return StepTime(*computed.parts, bubble, near, far, beside, awake, cooler)


def _links_awake(bursts: float, busy: float, computed: float, card: Card) -> float:
    """Seconds that links cost which are awake while a rank computes: during traffic, and for a while after it."""
    return card.rates.awake * min(computed, busy + bursts * card.rates.link_sleeps_s) if busy else 0.0


def _cooler(waits: float, idle: float, busy: float, card: Card) -> float:
    """What a higher clock gives back, negative: a share of short waits, and after a long one some time at the highest
    clock; at most the highest clock all the time."""
    rates = card.rates
    after_idle = (1 - rates.highest_clock) * min(busy, idle, rates.clock_lasts_s)
    return -min((1 - rates.waiting) * waits + after_idle, (1 - rates.highest_clock) * busy)
