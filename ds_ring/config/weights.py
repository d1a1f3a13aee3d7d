"""Where a run keeps the model's weights: DeepSpeed's own keys for it, read here and not handed to ``init_inference``.

"zero_optimization": {"stage": 3}                                           sharded
"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}       streamed
"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}             one copy on every 8 ranks
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from ds_ring.errors import ConfigError

Weights = Literal["whole", "sharded", "streamed"]
KEYS = ("zero_optimization", "zero")
"""DeepSpeed's names for one thing: in its training's configurations, and in those of its inference."""
PARTITION = "zero_hpz_partition_size"


def weights_of(document: Mapping[str, Any]) -> Weights:
    """
    Raises:
        ConfigError: something else than stage 0 or 3, or a place that is not the host's memory.
    """
    name, zero = _zero(document)
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in (0, 3):
        raise ConfigError(
            f"{name}.stage={stage!r}: there are no gradients and no optimizer to shard; take 3, which shards weights"
        )
    offload = zero.get("offload_param", {})
    if not isinstance(offload, dict):
        raise ConfigError(f"{name}.offload_param must be a JSON object, not {offload!r}")
    device = offload.get("device", "none")
    if device not in ("cpu", "none"):
        raise ConfigError(f"{name}.offload_param.device={device!r}: weights are streamed from cpu alone")
    known = {"stage", "offload_param", PARTITION}
    if unknown := sorted(map(str, set(zero) - known)):
        raise ConfigError(f"{name}.{unknown[0]} is not known here; known: {', '.join(sorted(known))}")
    if unknown := sorted(map(str, set(offload) - {"device", "pin_memory"})):
        raise ConfigError(f"{name}.offload_param.{unknown[0]} is not known here; known: device, pin_memory")
    if type(pinned := offload.get("pin_memory", True)) is not bool:
        raise ConfigError(f"{name}.offload_param.pin_memory={pinned!r} must be true or false")
    if stage == 0:
        if lost := [PARTITION] * (PARTITION in zero) + ["offload_param"] * (device == "cpu"):
            raise ConfigError(f"{name}.{lost[0]} counts with stage 3 alone (weights=sharded or streamed)")
        return "whole"
    return "streamed" if device == "cpu" else "sharded"


def weights_degree_of(document: Mapping[str, Any]) -> int | None:
    """How many ranks hold one copy between them; None where that is not given."""
    name, zero = _zero(document)
    degree = zero.get(PARTITION)
    if degree is not None and (type(degree) is not int or degree < 1):
        raise ConfigError(f"{name}.{PARTITION}={degree!r} must be a whole number of at least 1")
    return degree


def with_weights(document: Mapping[str, Any], *, weights: Any = None, degree: Any = None) -> dict[str, Any]:
    """``document`` with what is given, in DeepSpeed's keys.

    Raises:
        ConfigError: ``weights`` is none of ``Weights``, or what ``document`` has for it is not known.
    """
    name, zero = _zero(document)
    if weights is not None:
        weights_of(document)  # what is replaced is not lost without a word
        weights_degree_of(document)
        if weights not in get_args(Weights):
            raise ConfigError(f"weights={weights!r}: take one of {', '.join(get_args(Weights))}")
        kept = {PARTITION: zero[PARTITION]} if PARTITION in zero else {}
        place = {"offload_param": {"device": "cpu"}} if weights == "streamed" else {}
        zero = {} if weights == "whole" else {"stage": 3, **place, **kept}
    if degree is not None:
        zero = {**zero, PARTITION: degree}
    rest = {key: value for key, value in document.items() if key not in KEYS}
    return {**rest, name: zero} if zero else rest


def without_weights(document: Mapping[str, Any]) -> dict[str, Any]:
    """What is handed to DeepSpeed."""
    return {key: value for key, value in document.items() if key not in KEYS}


def _zero(document: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    given = [key for key in KEYS if document.get(key, {}) != {}]
    if len(given) > 1:
        raise ConfigError(f"{given[0]} and {given[1]} are two names for one thing; give one")
    name = given[0] if given else KEYS[0]
    zero = document.get(name, {})
    if not isinstance(zero, dict):
        raise ConfigError(f"{name} must be a JSON object, not {zero!r}")
    return name, zero
