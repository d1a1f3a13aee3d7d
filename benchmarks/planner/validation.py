"""The planner's predictions beside every recorded step, and how wrong they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import combinations
from statistics import median
from typing import Any

from benchmarks.planner.cases import LEFT_OUT, Case, cases
from benchmarks.planner.paper_workload import assumed, paper_rows
from ds_ring.planning.cards import CARDS
from ds_ring.planning.rates import ATTENTION, SOURCES, Rates
from ds_ring.planning.step_time import step_time

APART = 1.04
"""Layouts whose recorded steps differ by more have to come out in the right order."""
RULE = "two GPUs, the paper's model, 10,000 tokens a sequence"
"""What is fitted on, in words: ``Case.is_fitted_on``."""


def predicted_s(case: Case) -> float:
    return step_time(case.config, case.dims(), case.parameters(), case.card_of()).total


def error(case: Case) -> float:
    """Relative: positive where the prediction is too slow."""
    return predicted_s(case) / case.step_s - 1


def comparable(chosen: Sequence[Case]) -> Iterator[tuple[Case, Case]]:
    """Pairs of unlike layouts of one record, model, batch and length whose steps differ by more than ``APART``, the
    faster one first."""
    groups: dict[object, list[Case]] = defaultdict(list)
    for case in chosen:
        groups[case.together].append(case)
    for group in groups.values():
        for pair in combinations(group, 2):
            fast, slow = sorted(pair, key=lambda case: case.step_s)
            if fast.layout != slow.layout and slow.step_s > APART * fast.step_s:
                yield fast, slow


def summary(name: str, chosen: Sequence[Case]) -> dict[str, Any]:
    """Errors of ``chosen``, and how many pairs come out in the wrong order."""
    errors, pairs = [abs(error(case)) for case in chosen], list(comparable(chosen))
    return {
        "of": name,
        "steps": len(errors),
        "median_error": median(errors),
        "worst_error": max(errors),
        "pairs": len(pairs),
        "wrong_order": sum(predicted_s(fast) >= predicted_s(slow) for fast, slow in pairs),
    }


def document() -> dict[str, Any]:
    """``rows``: a summary of what is held out and of what is fitted on, then every step; ``constants`` with
    sources; the ``paper``'s workload, and what is ``assumed`` for it."""
    held_out = [case for case in cases() if not case.is_fitted_on]
    fitted_on = [case for case in cases() if case.is_fitted_on]
    return {
        "fitted_on": RULE,
        "left_out": LEFT_OUT,
        "constants": _constants(),
        "paper": paper_rows(),
        "assumed": assumed(),
        "rows": [
            summary("held out", held_out),
            summary("fitted on", fitted_on),
            *(_row(case) for case in held_out),
            *(_row(case) for case in fitted_on),
        ],
    }


def _row(case: Case) -> dict[str, Any]:
    work, ring = case.config.workload, case.config.ring
    seconds = predicted_s(case)
    return {
        "record": case.record,
        "fitted_on": case.is_fitted_on,
        "model": case.model,
        "card": case.card,
        "gpus": case.gpus,
        "layout": case.layout,
        "batch": work.batch_size,
        "micro_batch": work.micro_batch_size,
        "length": work.max_length,
        "in_flight": ring.in_flight if ring.interleave == "on" else 1,
        "recorded_ms": 1e3 * case.step_s,
        "predicted_ms": 1e3 * seconds,
        "error": seconds / case.step_s - 1,
    }


def _constants() -> list[dict[str, Any]]:
    rates = Rates()
    found: list[dict[str, Any]] = [
        {"name": f"product_flops of {name}", "value": CARDS[name].product_flops, "source": "fitted"}
        for name in ("H100", "H200")
    ]
    found += [{"name": f.name, "value": getattr(rates, f.name), "source": SOURCES[f.name]} for f in fields(rates)]
    for head_dim, rate in ATTENTION.items():
        source = f"measured: {rate.source}"
        found.append({"name": f"attention to head_dim {head_dim}: share", "value": rate.share, "source": source})
        found.append({"name": f"attention to head_dim {head_dim}: edge", "value": rate.edge, "source": source})
    return found
