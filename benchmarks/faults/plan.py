"""Which processes of which runs are killed, how and when."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

Target = Literal["rank", "launch", "runner", "pdsh", "ours"]
Phase = Literal["loading", "running", "writing"]
Command = Literal["ds-ring score", "ds-ring bench", "deepspeed score"]

COMMANDS: tuple[Command, ...] = ("ds-ring score", "ds-ring bench", "deepspeed score")
SIGNALS = ("KILL", "STOP", "TERM", "INT")
PHASES: tuple[Phase, ...] = ("loading", "running", "writing")


@dataclass(frozen=True)
class Trial:
    """One run and what happens to it.

    Attributes:
        target: whose process gets the signal; "launch" is DeepSpeed's launch.py, "runner" its ``deepspeed``, "ours"
            the ``ds-ring`` that a user started.
        delay: how long after the phase began, as a share of what the phase takes.
        choice: which of several such processes, as a share.
    """

    number: int
    hosts: int
    command: Command
    target: Target
    signal: str
    phase: Phase
    delay: float
    choice: float


def plan(count: int, seed: int, hosts: Sequence[int]) -> list[Trial]:
    """``count`` trials in which every combination comes once before any comes twice; the order is random.

    A stopped command of the user's own is left out: who stops it is at its terminal, and continues it.
    """
    rng = random.Random(seed)
    combinations = [
        (number, command, target, signal, phase)
        for number, command, signal, phase in product(hosts, COMMANDS, SIGNALS, PHASES)
        for target in targets(number, command)
        if (target, signal) != ("ours", "STOP")
    ]
    order: list[tuple[int, Command, Target, str, Phase]] = []
    while len(order) < count:
        order += rng.sample(combinations, len(combinations))
    return [
        Trial(number, *chosen, delay=rng.random(), choice=rng.random()) for number, chosen in enumerate(order[:count])
    ]


def targets(hosts: int, command: Command) -> list[Target]:
    """The kinds of processes that a run has."""
    found: list[Target] = ["rank", "launch", "runner"]
    if hosts > 1:
        found.append("pdsh")
    if command.startswith("ds-ring"):
        found.append("ours")
    return found
