"""Whether generations leave memory behind: what ranks hold after the first, the tenth, … and the last pass."""

from __future__ import annotations

from ds_ring.engine.engine import Engine
from ds_ring.utils.device import held_memory_gib


def recorded_passes(passes: int) -> set[int]:
    """After which of ``passes`` passes memory is recorded: 1, 10, 100, …, and the last."""
    return {10**power for power in range(len(str(passes)))} | {passes}


def most_held_gib(engine: Engine) -> float:
    """What the fullest rank holds between generations: GPU memory in tensors, or resident host memory. Collective."""
    return max(engine.gather(held_memory_gib(engine.device)))


def growth(held_gib_after_pass: dict[str, float]) -> float:
    """Memory held after the last pass ÷ after the tenth; of ten passes or fewer, ÷ after the first."""
    last = max(map(int, held_gib_after_pass))
    return held_gib_after_pass[str(last)] / held_gib_after_pass["10" if last > 10 else "1"]
