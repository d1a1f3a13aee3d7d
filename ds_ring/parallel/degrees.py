"""Which degrees divide what, and who runs which layers: arithmetic that rules and their error messages share."""

from __future__ import annotations

from collections.abc import Iterable


def valid_degrees(*counts: int, limit: int = 64) -> list[int]:
    """Degrees above 1 that divide all of ``counts``."""
    return [d for d in range(2, min(min(counts), limit) + 1) if all(c % d == 0 for c in counts)]


def suggest(degrees: Iterable[object], otherwise: str) -> str:
    """The fix that an error ends with: ``degrees`` to try or, where there are none, what else to do."""
    listed = [str(d) for d in degrees]
    if not listed:
        return otherwise
    return "try " + (listed[0] if len(listed) == 1 else ", ".join(listed[:-1]) + " or " + listed[-1])


def stage_layers(num_layers: int, pp_size: int, stage: int) -> range:
    """The layers of a pipeline stage; where they do not divide, earlier stages take one more."""
    base, extra = divmod(num_layers, pp_size)
    start = stage * base + min(stage, extra)
    return range(start, start + base + (stage < extra))
