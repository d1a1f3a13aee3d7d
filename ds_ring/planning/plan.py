"""Which layout suits a model, a batch and a number of GPUs: every one that can run, its predicted step and memory.

A prediction is arithmetic (``step_time.py``) with measured rates (``rates.py``, ``cards.py``), meant to order layouts,
not to replace ``launch/compare.py``. Data parallelism is always among the candidates: with a sequence for every GPU
nothing beats it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import PretrainedConfig

from ds_ring.config import RunConfig
from ds_ring.config.weights import weights_degree_of
from ds_ring.errors import ConfigError, UserError
from ds_ring.hf.dims import model_dims
from ds_ring.hf.flops import linear_parameters
from ds_ring.model_dims import ModelDims
from ds_ring.planning.candidates import degrees, pulls, stays_inside, with_lanes
from ds_ring.planning.cards import Card
from ds_ring.planning.comm_volume import Sent, bytes_by_axis
from ds_ring.planning.limits import check_size
from ds_ring.planning.memory_estimate import cache_bytes, in_flight, peak_bytes
from ds_ring.planning.step_time import StepTime, step_time
from ds_ring.planning.transfer_time import Transfers, transfers
from ds_ring.planning.validation import check_run
from ds_ring.utils.numbers import rate, size

WORTH = 0.002
"""The share of a step that more micro-batches in flight must save to be worth their memory."""
RESERVE = 0.92
"""Of a card's memory; the rest is the runtime's, NCCL's and what fragmentation takes. Assumed."""


@dataclass(frozen=True)
class Plan:
    """A layout and what is expected of it.

    Attributes:
        step: the seconds of one forward of the whole batch, as a sum.
        sent: bytes of all axes, where they travel.
        transfers: what they take with nothing beside them.
        lanes: micro-batches in flight.
        memory_gib: of the fullest rank: weights, activations of a micro-batch, K/V in transit (``memory_estimate``).
        fits: whether that is below the card's memory.
    """

    config: RunConfig
    step: StepTime
    sent: Sent
    transfers: Transfers
    lanes: int
    memory_gib: float
    fits: bool

    @property
    def label(self) -> str:
        weights = self.config.weights
        return self.config.topology.label() + ("" if weights == "whole" else f"_{weights}")

    @property
    def step_s(self) -> float:
        return self.step.total

    @property
    def exposed_s(self) -> float:
        """The part of the step in which communication shows, a pipeline's bubble included."""
        return self.step.exposed

    @property
    def shares_layers(self) -> bool:
        """Whether a rank holds only a part of the weights."""
        return self.config.topology.tp * self.config.topology.pp > 1

    def tps(self) -> float:
        work = self.config.workload
        return work.batch_size * work.max_length / self.step_s


def plans(
    run: RunConfig, dims: ModelDims, linear_parameters: int, ranks: int, card: Card, *, generating: bool = False
) -> list[Plan]:
    """All layouts of ``ranks`` ranks that ``run``'s model and workload allow: those that fit, fastest first, then the
    others, smallest first. Weights are where ``run`` says; its degrees are ignored. Sizes are those that
    ``limits.check_size`` lets through.

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
    for chosen in degrees(ranks, dims):
        candidate = _one_copy_a_host(RunConfig.load(run, **chosen), card)
        try:
            check_run(candidate, dims, ranks)
        except UserError as error:
            refusal = error
            continue
        if stays_inside(candidate, card):
            lanes = with_lanes(candidate, card)
            found.append(
                _fewest([predict(each, dims, linear_parameters, card, generating=generating) for each in lanes])
            )
    if not found:
        raise ConfigError(f"no layout of {ranks} ranks can run this: {refusal}")
    found.sort(key=lambda plan: (not plan.fits, plan.step_s if plan.fits else plan.memory_gib))
    return sorted(found, key=lambda plan: (not plan.fits, plan.fits and generating and plan.shares_layers))


def predict(
    config: RunConfig, dims: ModelDims, linear_parameters: int, card: Card, *, generating: bool = False
) -> Plan:
    """The step and memory of ``config``'s own layout."""
    work, t = config.workload, config.topology
    micro, engine = config.largest_micro_batch, pulls(config, card.per_host)
    held = peak_bytes(config, dims, linear_parameters, micro, pulls=engine)
    if generating:
        at_a_time = RunConfig.load(config, max_length=min(work.prefill_chunk or work.max_length, work.max_length))
        cache = cache_bytes(config, dims, math.ceil(work.batch_size / t.dp), work.max_length)
        held = peak_bytes(at_a_time, dims, linear_parameters, micro, pulls=engine) + cache
    sent = bytes_by_axis(config, dims, work.batch_size, work.max_length, config.itemsize, card.per_host)
    both = Sent(sum(one.near for one in sent.values()), sum(one.far for one in sent.values()))
    step, memory = step_time(config, dims, linear_parameters, card), held / 2**30
    lanes, moved = in_flight(config, micro, engine), transfers(config, dims, sent, card)
    return Plan(config, step, both, moved, lanes, memory, memory <= RESERVE * card.memory_gib)


def best_of(ordered: list[Plan], ranks: int, card: Card) -> tuple[Plan, str]:
    """The first of ``plans``, and a sentence that says why.

    Raises:
        ConfigError: none fits, with the smallest one's memory.
    """
    best = ordered[0]
    if not best.fits:
        raise ConfigError(
            f"no layout of {ranks} ranks fits {size(card.memory_gib * 2**30)} a rank: {best.label} comes closest with "
            f"{size(best.memory_gib * 2**30)}; take more ranks, shorter sequences, a smaller micro_batch_size or "
            f"weights=sharded"
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
    check_size(run, ranks)
    ordered = plans(run, model_dims(config), linear_parameters(config), ranks, card, generating=generating)
    best, reason = best_of(ordered, ranks, card)
    return best.config, reason


def _one_copy_a_host(config: RunConfig, card: Card) -> RunConfig:
    """With the ranks that hold weights between them as the engine takes them (``api.with_weights_degree``)."""
    if config.weights == "whole" or weights_degree_of(config.deepspeed) is not None:
        return config
    return RunConfig.load(config, weights_degree=math.gcd(config.topology.sp, card.per_host))


def _fewest(plans: list[Plan]) -> Plan:
    """The one with the fewest in flight that nearly does what the fastest does."""
    fastest = min((plan.step_s for plan in plans if plan.fits), default=math.inf)
    return next((plan for plan in plans if plan.fits and plan.step_s <= (1 + WORTH) * fastest), plans[0])


def _reason(best: Plan, others: list[Plan], batch: int, ranks: int) -> str:
    t, weights = best.config.topology, best.config.weights
    if best.shares_layers:
        whole = any(p.fits for p in others if not p.shares_layers)
        why = "layers are shared, " + ("which is faster here" if whole else "as the weights do not fit on one rank")
    elif t.sp == 1:
        keep = f"{_counted(batch, 'sequence')} {'keep' if batch > 1 else 'keeps'} {_counted(ranks, 'rank')} busy"
        why = f"{keep}, and replicas need no communication"
    else:
        why = f"{_counted(batch, 'sequence')} for {ranks} ranks, so {t.sp} share each"
    if weights != "whole":
        why += f", with weights {weights}"
    text = f"{best.label}: {why}; {rate(best.tps())} are predicted"
    rival = next((plan for plan in others if plan.fits), None)
    return text + (f", and {rate(rival.tps())} for {rival.label}, the next best layout" if rival else "")


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
