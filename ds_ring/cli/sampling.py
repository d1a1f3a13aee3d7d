"""How new tokens are chosen, and which of generate's options are refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ds_ring.cli.parser import LARGEST_SEED, LEAST_TEMPERATURE
from ds_ring.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling. ``temperature`` 0 means greedy decoding."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """Arguments for ``Engine.generate``."""
        # A checkpoint's own settings may ask for beam search, which is not served.
        if self.temperature == 0:
            return {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        chosen = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {"do_sample": True, "num_beams": 1, **chosen}


def check(max_new_tokens: int, sampling: Sampling) -> None:
    """Raise InputError for options that no model could follow."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if sampling.temperature and not LEAST_TEMPERATURE <= sampling.temperature < float("inf"):
        raise InputError(
            f"temperature={sampling.temperature} must be 0, which takes the likeliest token, or a number of at least "
            f"{LEAST_TEMPERATURE:g}"
        )
    if not 0 < sampling.top_p <= 1:
        raise InputError(f"top_p={sampling.top_p} must be above 0 and at most 1")
    if not 0 <= sampling.seed <= LARGEST_SEED:
        raise InputError(f"seed={sampling.seed} must be a whole number from 0 to {LARGEST_SEED}")
    if sampling.top_k < 0:
        raise InputError(f"top_k={sampling.top_k} must be at least 0; 0 leaves it out")
    for name, value, all_tokens in (("top_p", sampling.top_p, 1), ("top_k", sampling.top_k, 0)):
        if sampling.temperature == 0 and value != all_tokens:
            raise InputError(
                f"{name}={value} counts with a temperature alone: temperature=0 takes the likeliest token; give a "
                f"temperature, or leave {name} out"
            )
