"""Progress of a long command, on standard error: standard output is for results only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

WIDTH_WITHOUT_TERMINAL = 150


def make_console() -> Console:
    """A console on standard error, wide enough for tables where that is no terminal."""
    console = Console(stderr=True)
    return console if console.is_terminal else Console(stderr=True, width=WIDTH_WITHOUT_TERMINAL)


@contextmanager
def steps(console: Console, total: int) -> Iterator[tuple[Callable[[], None], Callable[[str], None]]]:
    """A progress bar of ``total`` steps. Yields two callables: advance by one step, and say what is being done."""
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)

        def say(text: str) -> None:
            progress.update(task, description=text)
            console.log(text, _stack_offset=2)

        yield lambda: progress.advance(task), say
