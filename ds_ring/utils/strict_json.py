"""JSON as its standard has it, which knows no NaN and no infinity: every document of this package is written here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

from ds_ring.errors import NumericsError


def dumps(
    document: Any, *, indent: int | None = None, default: Callable[[Any], Any] | None = None, ensure_ascii: bool = True
) -> str:
    """``json.dumps`` that refuses what other readers of JSON would.

    Raises:
        NumericsError: a number is not finite; names the first by its place in the document.
    """
    try:
        return json.dumps(document, indent=indent, default=default, ensure_ascii=ensure_ascii, allow_nan=False)
    except ValueError:
        for place, value in not_finite(document):
            raise NumericsError(f"{place or 'the result'} is {value}, which is no result and no JSON") from None
        raise


def not_finite(document: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Numbers in ``document`` that are not finite, each with its place, such as ``rows[0].tps``."""
    if isinstance(document, float) and not math.isfinite(document):
        yield place, document
    elif isinstance(document, dict):
        for name, value in document.items():
            yield from not_finite(value, f"{place}.{name}" if place else str(name))
    elif isinstance(document, list | tuple):
        for number, value in enumerate(document):
            yield from not_finite(value, f"{place}[{number}]")
