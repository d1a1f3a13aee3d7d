"""The least time of a decode step: reading the weights and the cache, at the rate of a copy."""

from __future__ import annotations

from typing import Any

from torch import nn

from ds_ring.engine.engine import Engine
from ds_ring.utils.device import copy_rate


def floor(engine: Engine, found: dict[str, Any]) -> dict[str, float | None]:
    """``decode_floor_ms`` and, of what ``timed_generation.generate`` gave, the step's time over it. Collective.

    All ranks are taken to hold as much cache as the fullest, which has one token more than others at most.
    """
    floor_ms, step_ms = 1e3 * step_floor_s(engine, int(found["cache_gib_per_rank"] * 2**30)), found["decode_tpot_ms"]
    return {"decode_floor_ms": floor_ms, "decode_over_floor": None if step_ms is None else step_ms / floor_ms}


def step_floor_s(engine: Engine, cache_bytes: int) -> float:
    """Seconds in which the ranks can read their weights and ``cache_bytes`` of cache each. Collective.

    Of ranks that share the work of a step, the slowest counts. Times of pipeline stages add up, because a token passes
    them one after the other. Of replicas, the slowest counts.
    """
    topology, own = engine.mesh.topology, (share_of_weights(engine) + cache_bytes) / copy_rate(engine.device)
    stages: dict[tuple[int, int], float] = {}
    for rank, seconds in enumerate(engine.gather(own)):
        at = topology.coordinates(rank)
        stage = at["dp"], at["pp"]
        stages[stage] = max(seconds, stages.get(stage, 0.0))
    return max(sum(stages[replica, stage] for stage in range(topology.pp)) for replica in range(topology.dp))


def share_of_weights(engine: Engine) -> float:
    """Bytes of this rank's weights that a token needs ÷ the ranks that share a sequence.

    An embedding that is not also the head is left out: a token reads one line of it. All experts of a mixture count.
    """
    head = getattr(engine.model.get_output_embeddings(), "weight", None)  # only the last stage has one
    embeddings = [module.weight for module in engine.model.modules() if isinstance(module, nn.Embedding)]
    left_out = {id(weight) for weight in embeddings if weight is not head}
    read = sum(p.nbytes for p in engine.model.parameters() if id(p) not in left_out)
    return read / engine.mesh["sp"].size
