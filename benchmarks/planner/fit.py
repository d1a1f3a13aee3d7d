"""The constants of ``planning/rates.py`` that whole steps give: least squares, by one rule for all of them.

What is made least is the sum of squares of relative errors of the steps that ``Case.is_fitted_on`` names; each counts
once. Gauss and Newton's method with numerical derivatives, from the values in the code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from benchmarks.planner.cases import Case, cases
from ds_ring.planning.cards import CARDS, Card
from ds_ring.planning.step_time import step_time

OF_CARDS = ("H100", "H200")
OF_ALL = ("beside_nccl", "waiting", "highest_clock", "own_copies")
"""Fields of ``Rates``."""
ROUNDS = 8


def fitted() -> dict[str, float]:
    """``product_flops`` of each card by the card's name, and fields of ``Rates`` by theirs."""
    names = [*OF_CARDS, *OF_ALL]
    start = [CARDS[name].product_flops for name in OF_CARDS]
    start += [getattr(CARDS["H100"].rates, name) for name in OF_ALL]
    scale, factors = np.array(start), np.ones(len(names))
    training = [case for case in cases() if case.is_fitted_on]
    for _ in range(ROUNDS):
        wrong = errors(training, names, scale * factors)
        slopes = []
        for i in range(len(names)):
            moved = factors.copy()
            moved[i] += 1e-4
            slopes.append((errors(training, names, scale * moved) - wrong) / 1e-4)
        change, *_ = np.linalg.lstsq(np.stack(slopes, 1), -wrong, rcond=None)
        factors += change
    return dict(zip(names, (scale * factors).tolist(), strict=True))


def errors(chosen: Sequence[Case], names: Sequence[str], values: np.ndarray) -> np.ndarray:
    """Relative errors of ``chosen`` with these constants."""
    given = dict(zip(names, values, strict=True))
    cards = {name: _with(CARDS[name], name, given) for name in OF_CARDS}
    return np.array(
        [
            step_time(case.config, case.dims(), case.parameters(), cards[case.card]).total / case.step_s - 1
            for case in chosen
        ]
    )


def _with(card: Card, name: str, given: dict[str, float]) -> Card:
    rates = replace(card.rates, **{field: float(given[field]) for field in OF_ALL})
    return replace(card, product_flops=float(given[name]), rates=rates)
