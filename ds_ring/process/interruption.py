"""Signals that end a command: an exception in the main thread, so that what was started ends too, and one line.

Ranks die of SIGTERM at once, by default: their launcher sends it, and a rank that waits inside PyTorch would not get to
a handler.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_S = 20.0
"""After so many seconds an interrupted process ends, whatever it still does."""


class Interrupted(KeyboardInterrupt):
    """This process got a signal that ends it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number

    @property
    def exit_code(self) -> int:
        return 128 + self.number


class _State:
    received: int | None = None
    deferred: int = 0


_state = _State()


def raise_on_signals() -> None:
    """From now on each of ``SIGNALS`` raises Interrupted in the main thread, the first time. A second one ends the
    process. What is ignored (as by nohup) stays so."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def end_rank_on_sigint() -> None:
    """From now on, in a launched rank, SIGINT ends the process, and rank 0 says so."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _end_rank if os.environ["RANK"] == "0" else signal.SIG_DFL)


@contextmanager
def deferred() -> Iterator[None]:
    """A signal that comes inside the block raises Interrupted at its end."""
    _state.deferred += 1
    try:
        yield
    finally:
        _state.deferred -= 1
    if _state.received is not None and not _state.deferred:
        number, _state.received = _state.received, None
        raise Interrupted(number)


def _interrupt(number: int, frame: FrameType | None) -> None:
    for other in SIGNALS:
        if signal.getsignal(other) is not signal.SIG_IGN:
            signal.signal(other, _end_now)
    last = threading.Timer(GRACE_S, os._exit, [128 + number])
    last.daemon = True
    last.start()
    if _state.deferred:
        _state.received = number
    else:
        raise Interrupted(number)


def _end_now(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def _end_rank(number: int, frame: FrameType | None) -> None:
    print(str(Interrupted(number)), file=sys.stderr, flush=True)
    os._exit(128 + number)
