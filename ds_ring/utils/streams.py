"""Standard streams that are closed, full or broken: what is lost on standard error ends nothing, and the result's place
on standard output fails by name."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from errno import EBADF
from typing import Any, TextIO, cast


class LossyStream:
    """A text stream of which nothing fails: what cannot be written is lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def prepare_streams() -> None:
    """From now on nothing that is said on standard error ends the process.

    Streams that are closed lead to the null device, or the next file that is opened would take their place and get what
    is printed. ``sys.stdout`` stays None where it was closed.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # or print would take standard output
    if not isinstance(sys.stderr, LossyStream):
        sys.stderr = cast(TextIO, LossyStream(sys.stderr))


def last_words(text: str) -> None:
    """Say why this process ends, where anybody still listens: a launcher that is gone took the pipe along."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def print_result(line: str) -> None:
    """Print the last line of standard output.

    Raises:
        OSError: it is closed, full, or nobody reads it.
    """
    if sys.stdout is None:
        raise OSError(EBADF, os.strerror(EBADF))
    try:
        print(line, flush=True)
    except ValueError:  # closed by the program itself
        raise OSError(EBADF, os.strerror(EBADF)) from None
