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


def sent(count: float) -> str:
    """``count`` bytes as data sheets of links have them, to three digits: ``4.42 MB``; GB at most."""
    power = next((power for power in (3, 2, 1) if count >= 1000**power), 0)
    return f"{_three_digits(count / 1000**power)} {('B', 'kB', 'MB', 'GB')[power]}"


def milliseconds(seconds: float) -> str:
    """``1,902 ms``, or ``0.0329 ms``: three digits at least."""
    return f"{_three_digits(1e3 * seconds)} ms"


def time_unit(seconds: float) -> tuple[float, str]:
    """(how many of it are a second, its name): s, ms or us, so that ``seconds`` need no leading zeros."""
    return (1.0, "s") if seconds >= 0.1 else (1e3, "ms") if seconds >= 1e-4 else (1e6, "us")


def duration(seconds: float) -> str:
    """``1.54 s``, ``32.9 ms`` or ``22 us``: three digits."""
    scale, unit = time_unit(abs(seconds))
    return f"{seconds * scale:.3g} {unit}"


def rate(tokens: float) -> str:
    """``tokens`` a second: ``1,263,412 tok/s``, or ``0.0312 tok/s``."""
    return f"{_three_digits(tokens)} tok/s"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
