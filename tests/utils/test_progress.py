"""Text of others on the terminal: as it is, and without effect."""

import io

import pytest
from rich.table import Table

from ds_ring.utils.plain_text import one_line, shown
from ds_ring.utils.progress import PlainConsole, steps

TEXTS = [
    ("RuntimeError: [/__w/pytorch/pair.cc:537] Connection closed by peer [127.0.0.1]:1",) * 2,
    ("layout [a] of [bold]x and [red] :smile: [link=x]y",) * 2,
    ("red \x1b[31m, bell \x07, back \x08, \x9b5m", r"red \x1b[31m, bell \x07, back \x08, \x9b5m"),
    ("half \udc80, turned \u202e", r"half \udc80, turned \u202e"),
    ("é 語 — ×",) * 2,
]


@pytest.mark.parametrize(("text", "expected"), TEXTS)
def test_text_is_text_in_bars_logs_and_tables(text, expected):
    console = PlainConsole(file=io.StringIO(), width=200)
    with steps(console, 1) as (advance, say):
        say(text)
        advance()
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    console.print(table)
    console.print(text)
    assert console.file.getvalue().count(expected) == 6
    assert "\x1b" not in console.file.getvalue()


def test_lines_become_one():
    assert one_line("  a\r\n  b\u2028c\td\x85 ") == "a b c\td"
    assert shown("a\r\nb") == "a\\x0d\nb"
