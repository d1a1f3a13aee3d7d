"""Which layout suits a model, a batch and a number of GPUs: every one that can run, its predicted step and memory.

A prediction is arithmetic and a few measured rates (``Card``), meant to order layouts, not to replace
``launch/compare.py``. Data parallelism is always among the candidates: with a sequence for every GPU nothing beats it.

    step = (linear + attention) x (1 + bubble) + exposed communication

- linear: 2 FLOPs a weight and token at the rate of a large matrix product, less for products of few rows;
- attention: causal, once (``metrics.Work``), at the share of that rate which its kernel reaches;
- bubble: (pp - 1) / micro-batches, the pipeline's filling and draining;
- exposed communication: bytes (``comm_volume``) over the link's rate, times how much of it showed when measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError, UserError
from ds_ring.hf.dims import model_dims
from ds_ring.hf.flops import linear_parameters
from ds_ring.kernels.attention512 import HEAD_DIM
from ds_ring.model_dims import ModelDims
from ds_ring.parallel.layout import SequenceLayout
from ds_ring.planning.cards import Card
from ds_ring.planning.comm_volume import bytes_sent_per_rank
from ds_ring.planning.memory_estimate import cache_bytes, in_flight, peak_bytes
from ds_ring.planning.metrics import Work
from ds_ring.planning.validation import check_run

EXPOSED = {"sp": 0.6, "tp": 1.3, "tp in flight": 0.7, "pp": 0.2}
"""Seconds that show for a second that the bytes take at the link's rate, inside a host: K/V or heads by copy engine
beside links that never sleep (ring 0.4 to 0.8, Ulysses 0.5: ``gpu2_two_in_flight.json`` and the traces in
benchmarks/results/; of that next to nothing is waiting, it is power), AutoTP's all-reduces one after the other
(``trace_tp2.json``) and with two micro-batches in flight (0.7 on two GPUs, ``gpu2.json``, 0.4 on four, ``gpu4.json``),
hidden states. ``pp`` is an estimate, as a bubble is measured together with it."""
LINK_SLEEPS_S = 0.05
"""After so long without traffic NVLink goes to sleep (``transfers_gpu2.json``)."""
IN_FLIGHT = (4, 8, 16)
"""Micro-batches that may go through a layer together, instead of the two that are configured by default."""
WORTH = 0.002
"""The share of a step that more micro-batches in flight must save to be worth their memory."""
EXPOSED_BETWEEN_HOSTS = EXPOSED | {"sp": 1.8}
"""The same by process groups: ``sp`` is near what ring showed in ``benchmarks/results/gpu2_h200_first.json``."""
ATTENTION_SHARE = {"head_dim 512": 0.87, "up to 256": 0.85, "other": 0.45}
"""Of the product's rate, by which kernel serves the head size (``attention/backends/select.py``)."""
FEW_ROWS = 64
"""Rows at which a product reaches half of its rate: weights are then read for too few tokens. An estimate."""
MESSAGE_S = 20e-6
"""What a message costs however small it is. An estimate."""
RESERVE = 0.92
"""Of a card's memory; the rest is the runtime's, NCCL's and what fragmentation takes."""


@dataclass(frozen=True)
class Plan:
    """A layout and what is expected of it.

    Attributes:
        step_s: one forward of the whole batch, seconds.
        exposed_s: the part of it in which communication shows, a pipeline's bubble included.
        memory_gib: of the fullest rank: weights, activations of a micro-batch, K/V in transit (``memory_estimate``).
        fits: whether that is below the card's memory.
    """

    config: RunConfig
    step_s: float
    exposed_s: float
    memory_gib: float
    fits: bool

    @property
    def label(self) -> str:
        return self.config.topology.label()

    def tps(self) -> float:
        work = self.config.workload
        return work.batch_size * work.max_length / self.step_s


def plans(
    run: RunConfig, dims: ModelDims, linear_parameters: int, ranks: int, card: Card, *, generating: bool = False
) -> list[Plan]:
    """All layouts of ``ranks`` ranks that ``run``'s model and workload allow: those that fit, fastest first, then the
    others, smallest first. The degrees in ``run`` are ignored.

    ``generating``: the workload is a generation's. Those that share layers come after others that fit: the predicted
    step is a prefill's, and new tokens cost more there, as stages wait for one another and steps are not CUDA graphs.
    Memory has the cache in it.

    Raises:
        ConfigError: none is possible; says what the last one breaks. Or the layouts are another implementation's.
    """
    if run.benchmark.implementation != "ds_ring":
        raise ConfigError(f"implementation={run.benchmark.implementation}: only ds_ring's layouts are planned")
    found: list[Plan] = []
    refusal: UserError | None = None
    for degrees in _degrees(ranks, dims):
        candidate = RunConfig.load(run, **degrees)
        try:
            check_run(candidate, dims, ranks)
        except UserError as error:
            refusal = error
            continue
        if candidate.parallel.ulysses_degree > card.per_host or candidate.tp_size > card.per_host:
            continue
        found.append(
            _with_lanes([_predict(each, dims, linear_parameters, card, generating) for each in _lanes(candidate, card)])
        )
    if not found:
        raise ConfigError(f"no layout of {ranks} ranks can run this: {refusal}")
    found.sort(key=lambda plan: (not plan.fits, plan.step_s if plan.fits else plan.memory_gib))
    return sorted(found, key=lambda plan: (not plan.fits, plan.fits and generating and _shares_layers(plan)))


def best_of(ordered: list[Plan], ranks: int, card: Card) -> tuple[Plan, str]:
    """The first of ``plans``, and a sentence that says why.

    Raises:
        ConfigError: none fits, with the smallest one's memory.
    """
    best = ordered[0]
    if not best.fits:
        raise ConfigError(
            f"no layout of {ranks} ranks fits {card.memory_gib:.0f} GiB a rank: {best.label} comes closest with "
            f"{best.memory_gib:.0f} GiB; take more ranks, shorter sequences or a smaller micro_batch_size"
        )
    return best, _reason(best, ordered[1:], best.config.workload.batch_size, ranks)


def with_planned_degrees(
    run: RunConfig, config: PretrainedConfig, ranks: int, card: Card, *, generating: bool = False
) -> tuple[RunConfig, str | None]:
    """``run`` with the planner's degrees where it leaves them to it, and why; anything else as it is, and None.

    ``generating``: as for ``plans``; a layout that shares layers is taken only where no rank has room for all of them.

    Raises:
        ConfigError: degrees beside ``auto``, or no layout that fits.
    """
    if not run.parallel.auto:
        return run, None
    t = run.topology
    if t.world_size > 1:
        raise ConfigError(
            f"parallel=auto chooses every degree, but {t.label()} is given as well; leave out one of both"
        )
    ordered = plans(run, model_dims(config), linear_parameters(config), ranks, card, generating=generating)
    best, reason = best_of(ordered, ranks, card)
    return best.config, reason


def _reason(best: Plan, others: list[Plan], batch: int, ranks: int) -> str:
    t = best.config.topology
    if _shares_layers(best):
        whole = any(p.fits for p in others if not _shares_layers(p))
        why = "layers are shared, " + ("which is faster here" if whole else "as the weights do not fit on one rank")
    elif t.sp == 1:
        why = f"{batch} sequences keep {ranks} ranks busy, and replicas need no communication"
    else:
        why = f"{batch} sequence(s) for {ranks} ranks, so {t.sp} share each"
    text = f"{best.label}: {why}; {best.tps():,.0f} tok/s predicted"
    rival = next((plan for plan in others if plan.fits), None)
    return text + (f", next {rival.label} with {rival.tps():,.0f}" if rival else "")


def _shares_layers(plan: Plan) -> bool:
    """Whether a rank holds only a part of the weights."""
    t = plan.config.topology
    return t.tp * t.pp > 1


def _degrees(ranks: int, dims: ModelDims) -> Iterator[dict[str, Any]]:
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


def _lanes(config: RunConfig, card: Card) -> list[RunConfig]:
    """``config``, and with more micro-batches in flight where there are as many and transfers leave links alone."""
    micro, ring = config.largest_micro_batch, config.ring
    by_copy_engine = ring.interleave == "auto" and in_flight(config, micro) > 1 and _inside(config, card)
    if not by_copy_engine or ring.in_flight > 2:
        return [config]
    possible = [lanes for lanes in IN_FLIGHT if lanes <= config.micro_batches(micro)]
    return [config, *(RunConfig.load(config, in_flight=lanes) for lanes in possible)]


def _with_lanes(plans: list[Plan]) -> Plan:
    """The one with the fewest in flight that nearly does what the fastest does."""
    fastest = min((plan.step_s for plan in plans if plan.fits), default=math.inf)
    return next((plan for plan in plans if plan.fits and plan.step_s <= (1 + WORTH) * fastest), plans[0])


def _inside(config: RunConfig, card: Card) -> bool:
    """Whether ranks that share a sequence are in one host."""
    return config.topology.world_size // config.topology.dp <= card.per_host


def _predict(config: RunConfig, dims: ModelDims, linear_parameters: int, card: Card, generating: bool) -> Plan:
    work, p, t = config.workload, config.parallel, config.topology
    itemsize = 4 if config.dtype == "fp32" else 2
    layout = SequenceLayout(work.max_length, p.ring_degree, p.ulysses_degree, p.ring_impl)
    rows = math.ceil(work.batch_size / t.dp)
    micro = config.largest_micro_batch
    steps = config.micro_batches(micro)
    tokens = rows * layout.local_length / (t.tp * t.pp)  # whole tokens' worth of work
    few = 1 + FEW_ROWS / (micro * layout.local_length)
    flops = Work(dims, linear_parameters, work.batch_size, work.max_length)
    linear = 2.0 * linear_parameters * tokens * few / card.product_flops
    share = ATTENTION_SHARE[_head_size(dims.head_dim)]
    attention = (flops.flops_per_token - 2.0 * linear_parameters) * tokens / (card.product_flops * share)
    compute = linear + attention
    bubble = compute * (t.pp - 1) / steps
    exposed = bubble + _exposed(config, dims, itemsize, steps, compute / (steps * dims.num_layers), card)
    held = peak_bytes(config, dims, linear_parameters, micro)
    if generating:
        at_a_time = RunConfig.load(config, max_length=min(work.prefill_chunk or work.max_length, work.max_length))
        cache = cache_bytes(config, dims, rows, work.max_length)
        held = peak_bytes(at_a_time, dims, linear_parameters, micro) + cache
    memory = held / 2**30
    return Plan(config, compute + exposed, exposed, memory, memory <= RESERVE * card.memory_gib)


def _head_size(head_dim: int) -> str:
    if head_dim == HEAD_DIM:
        return "head_dim 512"
    return "up to 256" if head_dim <= 256 else "other"


def _exposed(
    config: RunConfig, dims: ModelDims, itemsize: int, steps: int, layer_s: float, card: Card,
) -> float:  # fmt: skip
    """Seconds a step in which communication shows; ``layer_s``: what a layer computes on one micro-batch."""
    work, t = config.workload, config.topology
    sent = bytes_sent_per_rank(config, dims, work.batch_size, work.max_length, itemsize)
    kind = "sp" if t.sp > 1 else "tp" if t.tp > 1 else "pp"
    if kind == "tp" and in_flight(config, config.largest_micro_batch) > 1:
        kind = "tp in flight"
    inside = _inside(config, card)
    rate, shown = (card.link_bytes, EXPOSED) if inside else (card.network_bytes, EXPOSED_BETWEEN_HOSTS)
    messages = steps * dims.num_layers * (2 * (t.ulysses > 1) + (t.ring - 1) + 2 * (t.tp > 1)) / t.pp
    awake = 1.0
    if inside and config.ring.in_flight > 2:
        bursts = (1 + (t.ulysses > 1)) * dims.num_layers * steps / config.ring.in_flight
        awake = min(1.0, (sent / rate + bursts * LINK_SLEEPS_S) / (layer_s * steps * dims.num_layers))
    return shown[kind] * awake * sent / rate + messages * MESSAGE_S


def row(plan: Plan) -> dict[str, Any]:
    """A line of the table and of the JSON document."""
    return {
        "layout": plan.label,
        "in_flight": in_flight(plan.config, plan.config.largest_micro_batch),
        "tps": plan.tps(),
        "step_ms": 1e3 * plan.step_s,
        "exposed_ms": 1e3 * plan.exposed_s,
        "memory_gib": plan.memory_gib,
        "fits": plan.fits,
    }
