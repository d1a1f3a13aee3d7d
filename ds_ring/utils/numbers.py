"""Numbers as callers give them, and as messages show them."""

from __future__ import annotations

from operator import index

from ds_ring.errors import InputError


def whole_number(name: str, value: object, least: int | None = None) -> int:
    """Raise InputError unless ``value`` is a whole number of at least ``least``."""
    try:
        found = index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None or isinstance(value, bool) or (least is not None and found < least):
        raise InputError(
            f"{name}={value!r} must be a whole number" + ("" if least is None else f" of at least {least}")
        )
    return found


def size(count: float) -> str:
    """``count`` bytes with the unit that leaves a digit before the point: GiB, MiB or KiB."""
    power = 3 if count >= 2**30 else 2 if count >= 2**20 else 1
    return f"{count / 1024**power:,.1f} {'KMG'[power - 1]}iB"
