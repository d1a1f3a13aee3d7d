"""A plan in words: its sum, where its axes are, why others are faster, and which assumptions it rests on."""

from __future__ import annotations

from typing import Any

from ds_ring.model_dims import ModelDims
from ds_ring.parallel.topology import Axis
from ds_ring.planning.cards import Card
from ds_ring.planning.compute_time import attention_rate
from ds_ring.planning.placement import describe, placement
from ds_ring.planning.plan import RESERVE, Plan
from ds_ring.planning.rates import OTHER_ATTENTION
from ds_ring.planning.step_time import TERMS
from ds_ring.planning.transfer_time import pulled
from ds_ring.transport.select import PULLED_AXES
from ds_ring.utils.numbers import duration, sent

MEASURED_RANKS = 4
"""The largest group that a record has."""

LEAST = 1e-3
"""Of a step: what is less is not named."""


def row(plan: Plan, ordered: list[Plan], dims: ModelDims, card: Card) -> dict[str, Any]:
    """A line of the table and of the JSON document; bytes are those of one forward, means over ranks."""
    return {
        "layout": plan.label,
        "in_flight": plan.lanes,
        "tps": plan.tps(),
        "step_ms": 1e3 * plan.step_s,
        "exposed_ms": 1e3 * plan.exposed_s,
        "terms_ms": {TERMS[name]: 1e3 * getattr(plan.step, name) for name in TERMS},
        "sum": plan.step.text(),
        "placement": describe(plan.config.topology, card.per_host),
        "stays_gb": plan.sent.near / 1e9,
        "leaves_gb": plan.sent.far / 1e9,
        "transfers_alone": alone(plan),
        "memory_gib": plan.memory_gib,
        "fits": plan.fits,
        "why_slower": why_slower(plan, ordered),
        "assumed": assumptions(plan, dims, card),
    }


def alone(plan: Plan) -> str:
    """What transfers would take if nothing hid them; empty without any."""
    moved = plan.transfers
    parts = [f"{duration(moved.links)} in hosts"] * bool(moved.links)
    return ", ".join(parts + [f"{duration(moved.adapters)} between"] * bool(moved.adapters))


def why_slower(plan: Plan, ordered: list[Plan]) -> str:
    """What the fastest layout with as many ranks a replica does better; empty of that one itself."""
    replicas = plan.config.topology.dp
    best = next(other for other in ordered if other.config.topology.dp == replicas)
    if best is plan or not plan.fits:
        return ""
    more = {TERMS[name]: getattr(plan.step, name) - getattr(best.step, name) for name in TERMS}
    shown = [(name, seconds) for name, seconds in more.items() if seconds > LEAST * plan.step_s]
    largest = sorted(shown, key=lambda item: -item[1])[:3]
    named = ", ".join(f"{name} +{duration(seconds)}" for name, seconds in largest)
    text = f"{duration(plan.step_s - best.step_s)} more than {best.label}: {named}"
    received = received_keys(plan)
    if received is not None:
        text += f"; every rank receives {received:.2f} of all keys and values"
    return f"{text}; a rank sends {sent(plan.sent.total)}, with {best.label} {sent(best.sent.total)}"


def received_keys(plan: Plan) -> float | None:
    """Of all keys and values of a head, those that a rank of the ring receives, mean: zigzag 3/4 of (R - 1) / R,
    contiguous half of (R - 1) / R; None without a ring."""
    ring = plan.config.topology.ring
    if ring == 1:
        return None
    return (0.75 if plan.config.parallel.ring_impl == "zigzag" else 0.5) * (ring - 1) / ring


def assumptions(plan: Plan, dims: ModelDims, card: Card) -> list[str]:
    """What this plan rests on that no record has."""
    t, rates = plan.config.topology, card.rates
    found = [f"{1 - RESERVE:.0%} of memory left to the runtime", *([card.assumed] if card.assumed else [])]
    if any(attention_rate(head_dim) is OTHER_ATTENTION for _, head_dim in dims.heads_of_layers):
        found.append(f"attention at this head_dim at {OTHER_ATTENTION.share:.2f} of a product's rate")
    talking: tuple[Axis, ...] = ("ring", "ulysses", "tp")
    inside = [
        axis
        for axis in talking
        if t.size(axis) > MEASURED_RANKS and placement(t, axis, card.per_host).near >= MEASURED_RANKS
    ]
    if inside:
        found.append(
            f"links among more than {MEASURED_RANKS} GPUs of a host ({', '.join(inside)}) as among {MEASURED_RANKS}"
        )
    if any(
        placement(t, axis, card.per_host).near and not pulled(plan.config, axis, card.per_host)
        for axis in PULLED_AXES
        if axis != "weights"
    ):
        found.append("NCCL's messages in a host at the rate of its all-reduces")
    if plan.config.weights != "whole":
        found.append("layers that are fetched take from kernels beside them what keys and values do")
    if plan.config.weights == "streamed":
        found.append(f"{card.host_bytes / 1e9:.0f} GB/s from a host's memory to each GPU, all at once")
    if plan.sent.far:
        network = 8 * card.network_bytes * min(1.0, card.adapters) / 1e9
        found.append(
            f"{network:,.0f} Gbit/s a GPU between hosts, of which {rates.network_reached:.0%} are reached, "
            f"{1e6 * rates.network_message_s:.0f} us a message"
        )
        if plan.step.beside:
            found.append("NCCL between hosts takes as much from kernels beside it as in a host")
    if t.pp > 1 and plan.step.cooler:
        found.append(f"a clock that is high for {rates.clock_lasts_s} s after a wait")
    return found


def used(rows: list[dict[str, Any]]) -> list[str]:
    """All assumptions of ``rows``, each once."""
    return list(dict.fromkeys(text for row in rows for text in row["assumed"]))
