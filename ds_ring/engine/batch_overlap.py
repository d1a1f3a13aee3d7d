"""Several micro-batches in flight: while one waits for a transfer, another queues its layers on the GPU.

(Elsewhere: dual-batch or two-batch overlap.) A *lane* runs every n-th micro-batch. It is a greenlet: it runs until its
transfers are under way, yields, and goes on when all other lanes have yielded. The order is the same on every rank, as
the order of operations between ranks must be. All lanes are one thread: PyTorch keeps the current stream, cuBLAS's
workspaces and cuDNN's plans by thread, and lanes in threads of their own spent more time on planning for every new
length than on the attention itself.

With more than two lanes, all go through each layer together (``Lockstep``): the transfers of a layer come at once, and
NVLinks may sleep until the next layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

import torch
from greenlet import getcurrent, greenlet
from torch import nn
from torch.utils.hooks import RemovableHandle

T = TypeVar("T")


class _Lane(greenlet):
    is_last = False


def in_last_lane() -> bool:
    """Whether the caller is the lane that runs after all others."""
    lane = getcurrent()
    return isinstance(lane, _Lane) and lane.is_last


def run_interleaved(
    jobs: Sequence[Callable[[], T]], on_yield: Callable[[Callable[[], None] | None], None], lanes: int
) -> list[T]:
    """Run ``jobs`` in ``lanes`` lanes, lane i jobs i, i + lanes, ...; where one yields the next one goes on.

    Args:
        on_yield: is given the function by which jobs yield, called where they would only wait; None at the end.

    Returns:
        Results in the order of ``jobs``; the first error of any is raised, and all others stop where they are.
    """
    lanes = min(lanes, len(jobs))
    results, scheduler = dict[int, T](), getcurrent()

    def lane(number: int) -> None:
        for i in range(number, len(jobs), lanes):
            results[i] = jobs[i]()

    running = [_Lane(partial(lane, number)) for number in range(lanes)]
    running[-1].is_last = True
    on_yield(scheduler.switch)
    # The mode belongs to the thread: a lane that ended first would end it for the others.
    with torch.inference_mode():
        try:
            while running:
                for one in running:
                    one.switch()
                running = [one for one in running if not one.dead]
        finally:
            for one in running:
                _stop(one)
            on_yield(None)
    return [results[i] for i in range(len(jobs))]


def _stop(lane: _Lane) -> None:
    """Unwind the lane. What fails meanwhile follows from the error that it is stopped for."""
    while lane:
        with suppress(Exception):
            lane.throw()


class Lockstep:
    """More than two lanes, layer by layer. ``yield_lane`` is what ``run_interleaved`` gives.

    Lanes yield where a layer begins and before they transfer. The last lane yields before its projections instead: the
    transfers of the others run during those, and the first that is needed has arrived.
    """

    def __init__(self, yield_lane: Callable[[], None]) -> None:
        self._yield_lane = yield_lane
        self._last_lane_has_waited = False

    def hook(self, layers: nn.ModuleList) -> list[RemovableHandle]:
        """Layers yield from here on, until the handles are removed."""
        together = [layer.register_forward_pre_hook(self._begin_together) for layer in layers[1:]]
        return together + [layer.register_forward_pre_hook(self._let_last_lane_wait) for layer in layers]

    def before_transfer(self) -> None:
        if in_last_lane() and self._last_lane_has_waited:
            self._last_lane_has_waited = False
        else:
            self._yield_lane()

    def _begin_together(self, module: nn.Module, inputs: object) -> None:
        self._yield_lane()

    def _let_last_lane_wait(self, module: nn.Module, inputs: object) -> None:
        # Once only: over layers that transfer nothing it would fall further and further behind.
        if in_last_lane() and not self._last_lane_has_waited:
            self._last_lane_has_waited = True
            self._yield_lane()
