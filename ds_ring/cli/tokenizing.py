"""Text of the user's as tokens, each text once; a long one says how long it takes, and is refused early where its
beginning is too long already."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from ds_ring.errors import InputError

log = logging.getLogger("ds_ring")

FIRST_PART, GROWTH = 1 << 18, 8
"""Characters of a long text that are tokenized first, half a second's work, and by how much the next part is longer."""


def tokenized(tokenize: Callable[[str], list[int]], text: str, name: str, check: Callable[[int], object]) -> list[int]:
    """Token ids of ``text``.

    Args:
        name: of the text, for errors.
        check: raises InputError for a number of tokens that is too large.

    Raises:
        InputError: text that is no UTF-8, or too long.
    """
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of a command line that are no UTF-8 come as single surrogates
        raise InputError(f"{name} is not UTF-8 text") from None
    part = FIRST_PART
    while 2 * part < len(text):
        started = time.perf_counter()
        count = len(tokenize(text[:part]))
        elapsed_s = time.perf_counter() - started
        try:
            check(_at_least(count))
        except InputError as error:
            raise InputError(
                f"the first {part:,} of {len(text):,} characters of {name} are too many: {error}"
            ) from None
        if part == FIRST_PART:
            share = len(text) / part
            log.info(
                "%s: %s characters, about %s tokens, %.0f s to tokenize", name, f"{len(text):,}",
                f"{int(count * share):,}", elapsed_s * share,
            )  # fmt: skip
        part *= GROWTH
    found = tokenize(text)
    check(len(found))
    return found


def _at_least(count: int) -> int:
    """Tokens of the whole text, of whose beginning there are ``count``: where a word is cut, its part may have more."""
    return count - count // 20 - 64


def plain(tokenizer: Any, special_tokens: bool = True) -> Callable[[str], list[int]]:
    """Tokens of a text as it is, with the special tokens that the tokenizer adds by itself unless they are left out."""
    return lambda text: list(tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"])
