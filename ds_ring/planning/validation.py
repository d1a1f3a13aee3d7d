"""Every rule a run must satisfy before weights load or a process group exists: value, limit, fix."""

from __future__ import annotations

import logging
import os
from functools import cache

from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError, InputError, UnsupportedModelError
from ds_ring.model_dims import ModelDims
from ds_ring.parallel.degrees import suggest, valid_degrees

log = logging.getLogger("ds_ring")

SHARDABLE_LAYER_TYPES = {"full_attention", "sliding_attention"}


def check_run(config: RunConfig, dims: ModelDims, world_size: int) -> None:
    """Raise ConfigError or UnsupportedModelError for the first rule that ``config`` breaks.

    Runs on every rank with the same arguments, so all ranks refuse together.
    """
    check_layout(config, dims, world_size)
    check_workload(config, dims)


def check_positions(longest: int, new: int, dims: ModelDims) -> None:
    """Raise InputError where the longest row's tokens and those to come are more than the model has positions for."""
    limit = dims.max_positions
    if limit is not None and longest + new > limit:
        raise InputError(
            f"{longest} tokens of input + max_new_tokens={new} exceed the model's max_position_embeddings={limit}; "
            f"shorten either"
        )
    note_positions(longest + new, dims)


def note_positions(length: int, dims: ModelDims) -> None:
    """Say, once a process and on rank 0, where ``length`` is more than the model was made for. Rotary positions have no
    end, and what transformers would run is run."""
    intended = dims.intended_positions
    if dims.max_positions is None and intended is not None and length > intended and os.environ.get("RANK", "0") == "0":
        _note_beyond(intended)


@cache
def _note_beyond(intended: int) -> None:
    log.warning("the model was made for %d positions; longer texts run as in transformers, at lower quality", intended)


def check_layout(config: RunConfig, dims: ModelDims, world_size: int) -> None:
    """The rules of a layout by itself."""
    assert not config.parallel.auto, "plan.with_planned_degrees comes first"
    check_axes(config, world_size)
    _check_model(dims)
    _check_heads(config, dims)
    _check_tensor_pipeline(config, dims)
    _check_weights(config)
    if config.ring.in_flight > 2 and config.ring.interleave == "off":
        raise ConfigError(f"in_flight={config.ring.in_flight} beside interleave=off: leave out one of both")


def check_axes(config: RunConfig, world_size: int) -> None:
    """The rules of the degrees by themselves, whatever the model."""
    t = config.topology
    if t.sp > 1 and t.tp * t.pp > 1:
        raise ConfigError(
            f"ring_degree={t.ring} x ulysses_degree={t.ulysses} cannot be combined with tp_size={t.tp} x "
            f"pp_size={t.pp}: a replica is either sequence parallel or tensor x pipeline parallel; set one pair to 1"
        )
    if t.world_size != world_size:
        raise ConfigError(
            f"dp_size={t.dp} x pp_size={t.pp} x ring_degree={t.ring} x ulysses_degree={t.ulysses} x tp_size={t.tp} "
            f"= {t.world_size} ranks, but {world_size} were launched; launch with --num_gpus {t.world_size} "
            f"(ds-ring: --ranks {t.world_size}) or change the degrees"
        )


def _check_weights(config: RunConfig) -> None:
    if config.weights == "whole":
        return
    t, shared = config.topology, config.topology.weights
    if t.tp * t.pp > 1:
        raise ConfigError(
            f"weights={config.weights} cannot be combined with tp_size={t.tp} x pp_size={t.pp}, whose ranks hold parts "
            f"of the model already; take ring_degree or ulysses_degree, or weights=whole"
        )
    if t.sp == 1 and config.weights == "sharded":
        raise ConfigError(
            "weights=sharded needs ranks that share a sequence: raise ring_degree or ulysses_degree, or take "
            "weights=streamed"
        )
    if t.sp % shared:
        raise ConfigError(
            f"weights_degree={shared} does not divide the {t.sp} ranks that share a sequence; "
            + suggest(valid_degrees(t.sp), "use 1")
        )


def _check_model(dims: ModelDims) -> None:
    foreign = sorted(set(dims.layer_types) - SHARDABLE_LAYER_TYPES)
    if foreign:
        raise UnsupportedModelError(
            f"{dims.model_type} has layers of type {', '.join(foreign)}; "
            f"only {', '.join(sorted(SHARDABLE_LAYER_TYPES))} can be sharded"
        )
    for kv_heads, _ in dims.heads_of_layers:
        if kv_heads < 1 or dims.num_heads % kv_heads:
            raise UnsupportedModelError(
                f"{dims.model_type} has num_heads={dims.num_heads}, which its num_kv_heads={kv_heads} must divide"
            )


def _check_heads(config: RunConfig, dims: ModelDims) -> None:
    t = config.topology
    p = config.parallel
    if dims.unlike_layers and (t.tp * t.pp > 1 or p.decode == "sliced"):
        raise UnsupportedModelError(
            f"{dims.model_type} has layers with unlike heads, which tp_size, pp_size and decode=sliced do not serve; "
            f"take ring_degree, ulysses_degree or dp_size"
        )
    degree = config.parallel.ulysses_degree
    if dims.num_heads % degree:
        raise ConfigError(
            f"num_heads={dims.num_heads} is not divisible by ulysses_degree={degree}; "
            + suggest(valid_degrees(dims.num_heads), "use ring_degree instead")
        )
    sp = config.topology.sp
    for name in ("num_heads", "num_kv_heads") if config.parallel.decode == "sliced" else ():
        count = getattr(dims, name)
        if count % sp:
            raise ConfigError(
                f"{name}={count} is not divisible by the {sp} ranks that share a sequence, which decode=sliced needs; "
                + suggest(valid_degrees(dims.num_heads, dims.num_kv_heads), "use decode=whole")
            )


def _check_tensor_pipeline(config: RunConfig, dims: ModelDims) -> None:
    tp, pp = config.tp_size, config.parallel.pp_size
    for name in ("num_heads", "num_kv_heads", "intermediate_size", "hidden_size"):
        count = getattr(dims, name)
        if count % tp:
            fitting = valid_degrees(dims.num_heads, dims.num_kv_heads, dims.intermediate_size, dims.hidden_size)
            raise ConfigError(
                f"{name}={count} is not divisible by tp_size={tp}; " + suggest(fitting, "use pp_size instead")
            )
    if pp > dims.num_layers:
        raise ConfigError(
            f"pp_size={pp} is more than the model's {dims.num_layers} layers; take at most {dims.num_layers}"
        )


def check_workload(config: RunConfig, dims: ModelDims) -> None:
    """The rules of a benchmark's batch and lengths."""
    work, dp = config.workload, config.parallel.dp_size
    longest = config.lengths[-1]
    if config.lengths[0] < 1:
        raise ConfigError(f"sweep={config.lengths[0]} must be at least 1")
    if dims.max_positions is not None and longest > dims.max_positions:
        name = "max_length" if longest == work.max_length else "sweep"
        raise ConfigError(
            f"{name}={longest} exceeds the model's max_position_embeddings={dims.max_positions}; shorten it"
        )
    note_positions(longest, dims)
    if work.batch_size < dp:
        raise ConfigError(
            f"batch_size={work.batch_size} leaves some of dp_size={dp} replicas without a sequence; "
            f"raise batch_size to {dp} or lower dp_size"
        )
    if config.micro_batch_sizes[0] < 1:
        raise ConfigError(f"micro_batch_sizes={config.micro_batch_sizes[0]} must be at least 1")
