"""Several micro-batches in flight: while one waits for a transfer, the other queues its layers.

Each lane is a thread, and only the one that holds the baton runs: a lane runs until its transfers are under way, hands
on, and goes on when the baton comes back. What runs when is the same in every run and on every rank, as the order of
operations between ranks must be; all lanes queue on one stream, so that the GPU sees one program.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

T = TypeVar("T")


class _Stopped(Exception):
    """Another lane failed."""


class Baton:
    """Goes round ``lanes`` threads. Lanes that have ended are passed over."""

    def __init__(self, lanes: int) -> None:
        self._running = [True] * lanes
        self._holder = 0
        self._failed = False
        self._moved = threading.Condition()
        self._own = threading.local()

    def enter(self, lane: int) -> None:
        """The calling thread becomes ``lane`` and waits for its turn."""
        self._own.lane = lane
        with self._moved:
            self._wait(lane)

    def hand_over(self) -> None:
        """Let the other lanes run, each until it hands over or ends."""
        lane = self._own.lane
        with self._moved:
            self._pass_on(lane)
            self._wait(lane)

    def leave(self, failed: bool = False) -> None:
        """The calling thread's lane has ended; if it failed, all others stop."""
        lane = self._own.lane
        with self._moved:
            self._running[lane] = False
            self._failed |= failed
            self._pass_on(lane)

    def _pass_on(self, lane: int) -> None:
        count = len(self._running)
        following = [(lane + step) % count for step in range(1, count + 1)]
        self._holder = next((other for other in following if self._running[other]), lane)
        self._moved.notify_all()

    def _wait(self, lane: int) -> None:
        self._moved.wait_for(lambda: self._failed or self._holder == lane)
        if self._failed:
            raise _Stopped


def run_interleaved(
    jobs: Sequence[Callable[[], T]],
    on_hand_over: Callable[[Callable[[], None] | None], None],
    device: torch.device,
    lanes: int,
) -> list[T]:
    """Run ``jobs`` in so many lanes, each lane every so-manieth of them; the calling thread is the first lane.

    Args:
        on_hand_over: is given what jobs call when they only wait; None at the end.
        device: where jobs compute; lanes share the caller's current stream.

    Returns:
        Results in the order of ``jobs``; the first error of any is raised.
    """
    lanes = min(lanes, len(jobs))
    baton, results, errors = Baton(lanes), dict[int, T](), list[BaseException]()
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def lane(number: int) -> None:
        failed = True
        try:
            baton.enter(number)
            for i in range(number, len(jobs), lanes):
                results[i] = jobs[i]()
            failed = False
        except _Stopped:
            pass
        except BaseException as error:
            errors.append(error)
        finally:
            baton.leave(failed)

    modes = _get_current_dispatch_mode_stack()

    def other_lane(number: int) -> None:
        # What looks on, and which device and stream are current, is a thread's own affair.
        with ExitStack() as alike:
            for mode in modes:
                alike.enter_context(mode)
            if stream is not None:
                alike.enter_context(torch.cuda.device(device))
                alike.enter_context(torch.cuda.stream(stream))
            lane(number)

    threads = [threading.Thread(target=other_lane, args=(number,), daemon=True) for number in range(1, lanes)]
    on_hand_over(baton.hand_over)
    try:
        for thread in threads:
            thread.start()
        lane(0)
        for thread in threads:
            thread.join()
    finally:
        on_hand_over(None)
    if errors:
        raise errors[0]
    return [results[i] for i in range(len(jobs))]
