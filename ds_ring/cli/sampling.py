"""How new tokens are chosen by the command, whatever the checkpoint asks for."""

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
        # They replace the checkpoint's own, which may ask for beam search, which is not served: ``overridden`` says so.
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


def overridden(checkpoint: dict[str, Any], sampling: Sampling) -> str | None:
    """What the checkpoint's own settings ask for and the command decides otherwise, in one line; None: nothing."""
    chosen = sampling.options()
    sampled = checkpoint.get("do_sample") is True
    counts = [name for name in chosen if checkpoint.get(name) is not None and (sampled or name == "num_beams")]
    other = [name for name in counts if checkpoint[name] != chosen[name]]
    if not other:
        return None
    asked = ", ".join(f"{name}={checkpoint[name]}" for name in other)
    own = ", ".join(f"{name}={chosen[name]}" for name in other if chosen[name] is not None)
    return f"generation_config.json asks for {asked}: this command decodes with {own}"
