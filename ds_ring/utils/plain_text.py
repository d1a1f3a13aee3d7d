"""Text of others' (errors, file names, output of ranks) made fit to be shown: no character of it acts on a terminal."""

from __future__ import annotations

import re
import unicodedata

_REORDER = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""They turn round what follows them on the screen."""


def shown(text: str) -> str:
    r"""``text`` with control characters and lone surrogates as escapes, such as ``\x1b``; newlines and tabs stay."""
    return "".join(_escaped(c) if _acts(c) else c for c in text)


def one_line(text: str) -> str:
    """``shown``, with the breaks between lines as blanks."""
    return shown(re.sub(r"\s*[\r\n\v\f\x85\u2028\u2029]+\s*", " ", text).strip())


def _acts(character: str) -> bool:
    return character not in "\n\t" and (unicodedata.category(character) in ("Cc", "Cs") or character in _REORDER)


def _escaped(character: str) -> str:
    return (
        character.encode("ascii", "backslashreplace").decode() if ord(character) > 127 else f"\\x{ord(character):02x}"
    )
