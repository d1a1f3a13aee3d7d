"""Progress of a long command, on standard error: standard output is for results only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from ds_ring.utils.plain_text import shown

WIDTH_WITHOUT_TERMINAL = 150


class PlainConsole(Console):
    """A console that shows every text as it is: nothing in it is markup, and nothing acts on the terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(shown(text), **{**options, "markup": False, "emoji": False})


class PlainColumn(TextColumn):
    """A column of a progress bar with the task's description as it is."""

    def __init__(self) -> None:
        super().__init__("{task.description}", markup=False)

    def render(self, task: Task) -> Text:
        return Text(shown(task.description))


def make_console() -> Console:
    """A console on standard error, wide enough for tables where that is no terminal."""
    console = PlainConsole(stderr=True)
    return console if console.is_terminal else PlainConsole(stderr=True, width=WIDTH_WITHOUT_TERMINAL)


@contextmanager
def steps(console: Console, total: int) -> Iterator[tuple[Callable[[], None], Callable[[str], None]]]:
    """A progress bar of ``total`` steps. Yields two callables: advance by one step, and say what is being done."""
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), PlainColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)

        def say(text: str) -> None:
            progress.update(task, description=text)
            console.log(text, _stack_offset=2)

        yield lambda: progress.advance(task), say
