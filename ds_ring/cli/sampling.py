"""How new tokens are chosen, and which of generate's options are refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


def check(sampling: Sampling) -> None:
    """Raise InputError for options that contradict each other; each by itself has its limits in the parser."""
    for name, value, all_tokens in (("top_p", sampling.top_p, 1), ("top_k", sampling.top_k, 0)):
        if sampling.temperature == 0 and value != all_tokens:
            raise InputError(
                f"{name}={value} counts with a temperature alone: temperature=0 takes the likeliest token; give a "
                f"temperature, or leave {name} out"
            )
