"""A search for the longest sequence that fits: doubling the length, then bisection.

Lengths to try are estimated from the memory of shorter attempts, but the result is always a length that was tried.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Attempt:
    """One forward of one sequence.

    Attributes:
        seconds: time of the forward, to the logits of the last token, on the slowest rank; None where it does not fit.
        peak_memory_gib: the most that each rank held.
        memory_gib: the most that each rank may hold; None on CPUs.
    """

    length: int
    seconds: float | None = None
    peak_memory_gib: tuple[float, ...] = ()
    memory_gib: float | None = None
    device: str | None = None

    @property
    def fits(self) -> bool:
        return self.seconds is not None

    def row(self) -> dict[str, Any]:
        tokens_per_second = self.length / self.seconds if self.seconds else None
        return {**asdict(self), "fits": self.fits, "tokens_per_second": tokens_per_second}


def search(
    attempt: Callable[[int], Attempt], first: int, most: int, granularity: float
) -> tuple[Attempt | None, Attempt | None]:
    """(the longest that fits, the shortest that does not fit). The second is at most a share ``granularity`` longer.

    Args:
        attempt: tries one length.
        first: the length that is tried first.
        most: no longer ones are tried. Where it fits, the second of the results is None.
    """
    fitting: list[Attempt] = []
    failing: Attempt | None = None

    def fits(length: int) -> bool:
        nonlocal failing
        made = attempt(length)
        if made.fits:
            fitting.append(made)
        else:
            failing = made
        return made.fits

    length = min(first, most)
    while fits(length) and length < most:
        length = min(2 * length, most)
    while not fitting and length > 1:
        length //= 2
        fits(length)
    if not fitting or failing is None:
        return (fitting[-1] if fitting else None), failing
    guesses = _around(_predict(fitting), granularity)
    while failing.length > max(fitting[-1].length * (1 + granularity), fitting[-1].length + 1):
        low, high = fitting[-1].length, failing.length
        halfway = min(max(round((low * high) ** 0.5), low + 1), high - 1)
        fits(next((guess for guess in guesses if low < guess < high), halfway))
    return fitting[-1], failing


def _around(length: float | None, granularity: float) -> tuple[int, ...]:
    """Two lengths that are ``granularity`` apart, around ``length``. If it is the limit, they are enough to show it."""
    half = (1 + granularity) ** 0.5
    return () if length is None else (int(length / half) + 1, int(length * half))


def _predict(fitting: list[Attempt]) -> float | None:
    """The length at which memory runs out, extrapolated from the fullest rank of the two longest that fit."""
    if len(fitting) < 2 or fitting[-1].memory_gib is None:
        return None
    (short, less), (long, more) = ((made.length, max(made.peak_memory_gib)) for made in fitting[-2:])
    return long + (fitting[-1].memory_gib - more) * (long - short) / (more - less) if more > less else None
