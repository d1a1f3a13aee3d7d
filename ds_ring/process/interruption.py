"""Signals that end a command: an exception in the main thread, so that what was started ends too, and one line.

An import is no place for an exception: packages catch it, wrap it or print it, and importing torch takes seconds.
There, and before a command has begun (``start``), the process ends in the handler.

Ranks die of SIGTERM at once, by default: their launcher sends it, and a rank that waits inside PyTorch would not get to
a handler.
"""

from __future__ import annotations

import importlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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


def start(module: str) -> None:
    """Import a command's ``module`` and call its ``main``. From here on a signal ends this process in one line."""
    if "RANK" in os.environ:
        end_rank_on_sigint()
        importlib.import_module(module).main()
        return
    end_on_signals()
    main = importlib.import_module(module).main
    raise_on_signals()
    try:
        main()
    except BaseException:
        if (interrupted := received()) is None:
            raise
        _end_now(interrupted.number)


def end_on_signals() -> None:
    """From now on each of ``SIGNALS`` ends the process, and is said in one line. What is ignored (as by nohup) stays
    so."""
    _handle(_end_now)


def raise_on_signals() -> None:
    """From now on each of ``SIGNALS`` raises Interrupted in the main thread, the first time. A second one ends the
    process, as does the first inside an import. What is ignored stays so."""
    _handle(_interrupt)


def ignore_here_alone() -> None:
    """Signals that this process ignores have their default action in what it starts from now on, which would inherit
    an ignored one but no handler."""
    for number in SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)


def received() -> Interrupted | None:
    """The signal that ``raise_on_signals`` has seen, whatever became of the exception."""
    return None if _state.received is None else Interrupted(_state.received)


def end_rank_on_sigint() -> None:
    """From now on, in a launched rank, SIGINT ends the process, and rank 0 says so."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _end_now if os.environ["RANK"] == "0" else signal.SIG_DFL)


@contextmanager
def deferred() -> Iterator[None]:
    """A signal that comes inside the block raises Interrupted at its end."""
    before = _state.received
    _state.deferred += 1
    try:
        yield
    finally:
        _state.deferred -= 1
    if _state.received != before and not _state.deferred:
        raise Interrupted(_state.received or 0)


def _handle(handler: Callable[[int, FrameType | None], None]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _handle(_end_now)
    _state.received = number
    last = threading.Timer(GRACE_S, _end_now, [number])
    last.daemon = True
    last.start()
    if not _state.deferred:
        if _is_importing(frame):
            _end_now(number)
        raise Interrupted(number)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _end_now(number: int, frame: FrameType | None = None) -> None:
    # Not print: the signal may have come while another line was written.
    with suppress(OSError):
        os.write(2, f"{Interrupted(number)}\n".encode())
    os._exit(128 + number)
