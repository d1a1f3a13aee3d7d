"""Several micro-batches in flight: while one waits for a transfer, the other queues its layers.

A lane is a greenlet: it runs until its transfers are under way, hands over, and goes on when its turn comes back. What
runs when is the same in every run and on every rank, as the order of operations between ranks must be. All lanes are
one thread: PyTorch keeps the current stream, cuBLAS's workspaces and cuDNN's plans by thread, and plans that each lane
built for itself, for every new length, took longer than the attention that they are for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

import torch
from greenlet import getcurrent, greenlet

T = TypeVar("T")


class _Lane(greenlet):
    is_last = False


def in_last_lane() -> bool:
    """Whether the caller's turn comes behind those of all other lanes."""
    lane = getcurrent()
    return isinstance(lane, _Lane) and lane.is_last


def run_interleaved(
    jobs: Sequence[Callable[[], T]], on_hand_over: Callable[[Callable[[], None] | None], None], lanes: int
) -> list[T]:
    """Run ``jobs`` in so many lanes, each lane every so-manieth of them; lanes take turns at every hand-over.

    Args:
        on_hand_over: is given what jobs call when they only wait; None at the end.

    Returns:
        Results in the order of ``jobs``; the first error of any is raised, and all others stop where they are.
    """
    lanes = min(lanes, len(jobs))
    results, turns = dict[int, T](), getcurrent()

    def lane(number: int) -> None:
        for i in range(number, len(jobs), lanes):
            results[i] = jobs[i]()

    running = [_Lane(partial(lane, number)) for number in range(lanes)]
    running[-1].is_last = True
    on_hand_over(turns.switch)
    # A thread is in this mode or not: a lane that ended first would take the others out of it.
    with torch.inference_mode():
        try:
            while running:
                for one in running:
                    one.switch()
                running = [one for one in running if not one.dead]
        finally:
            for one in running:
                _stop(one)
            on_hand_over(None)
    return [results[i] for i in range(len(jobs))]


def _stop(lane: _Lane) -> None:
    """Leave what the lane is in. What fails on the way out follows from the error that it is stopped for."""
    while lane:
        with suppress(Exception):
            lane.throw()
