"""Every rule a run must satisfy before weights load or a process group exists: value, limit, fix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod

from ds_ring.config import PEER_DEGREES, RunConfig
from ds_ring.errors import ConfigError, InputError, UnsupportedModelError

SHARDABLE_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class ModelShape:
    """What layouts need to know of a model.

    Attributes:
        num_kv_heads, head_dim: of every layer or, where layers differ, the fewest and the largest.
        unlike_layers: where layers differ, (key/value heads, head_dim) of each.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int | None
    layer_types: tuple[str, ...] = ()
    sliding_window: int | None = None
    softcap: float | None = None
    unlike_layers: tuple[tuple[int, int], ...] = ()

    @property
    def heads_of_layers(self) -> tuple[tuple[int, int], ...]:
        """(key/value heads, head_dim) of every layer."""
        return self.unlike_layers or ((self.num_kv_heads, self.head_dim),) * self.num_layers

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many positions every layer sees; None: all."""
        kinds = self.layer_types or ("sliding_attention",) * self.num_layers
        return tuple(self.sliding_window if kind == "sliding_attention" else None for kind in kinds)


def check_run(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Raise ConfigError or UnsupportedModelError for the first rule that ``config`` breaks.

    Runs on every rank with the same arguments, so all ranks refuse together.
    """
    check_layout(config, shape, world_size)
    check_workload(config, shape)


def check_positions(longest: int, new: int, shape: ModelShape) -> None:
    """Raise InputError where the longest row's tokens and those to come are more than the model has positions for."""
    limit = shape.max_positions
    if limit is not None and longest + new > limit:
        raise InputError(
            f"{longest} tokens of input + max_new_tokens={new} exceed the model's max_position_embeddings={limit}; "
            f"shorten either"
        )


def check_engine(config: RunConfig, shape: ModelShape, world_size: int, device_type: str) -> None:
    """The rules of a layout on the machine at hand: what an engine needs there."""
    check_layout(config, shape, world_size)
    check_device(config, device_type)
    check_installed(config)


def check_layout(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """The rules of a layout by itself."""
    assert not config.parallel.auto, "plan.resolve comes first"
    _check_axes(config, world_size)
    _check_model(shape)
    _check_heads(config, shape)
    _check_tensor_pipeline(config, shape)
    if config.ring.in_flight > 2 and config.ring.interleave == "off":
        raise ConfigError(f"in_flight={config.ring.in_flight} beside interleave=off: leave out one of both")
    if config.parallel.implementation != "ds_ring":
        _check_peer(config, shape)


def check_device(config: RunConfig, device_type: str) -> None:
    """The rule of a layout by where it runs, ``"cuda"`` or ``"cpu"``."""
    whose = config.parallel.implementation
    if whose in GPU_PEERS and device_type == "cpu":
        raise ConfigError(f"implementation={whose}: {GPU_PEERS[whose]} for GPUs alone; leave it out on CPUs")


def check_installed(config: RunConfig) -> None:
    """The rule of a layout by what is installed. A comparison leaves it to each layout's own launch: that a peer is
    missing is a line of its table and does not keep it from the others."""
    if config.parallel.implementation == "yunchang" and find_spec("yunchang") is None:
        raise ConfigError("implementation=yunchang: it is not installed; pip install yunchang")


def valid_degrees(*counts: int, limit: int = 64) -> list[int]:
    """Degrees above 1 that divide all of ``counts``."""
    return [d for d in range(2, min(min(counts), limit) + 1) if all(c % d == 0 for c in counts)]


def _check_axes(config: RunConfig, world_size: int) -> None:
    t = config.topology
    if t.sp > 1 and t.tp * t.pp > 1:
        raise ConfigError(
            f"ring_degree={t.ring} x ulysses_degree={t.ulysses} cannot be combined with tp_size={t.tp} x "
            f"pp_size={t.pp}: a replica is either sequence parallel or tensor x pipeline parallel; set one pair to 1"
        )
    if t.world_size != world_size:
        raise ConfigError(
            f"dp_size={t.dp} x pp_size={t.pp} x ring_degree={t.ring} x ulysses_degree={t.ulysses} x tp_size={t.tp} "
            f"= {t.world_size} ranks, but {world_size} were launched; launch with --num_gpus {t.world_size} or "
            f"change the degrees"
        )


def _check_model(shape: ModelShape) -> None:
    foreign = sorted(set(shape.layer_types) - SHARDABLE_LAYER_TYPES)
    if foreign:
        raise UnsupportedModelError(
            f"{shape.model_type} has layers of type {', '.join(foreign)}; "
            f"only {', '.join(sorted(SHARDABLE_LAYER_TYPES))} can be sharded"
        )
    for kv_heads, _ in shape.heads_of_layers:
        if kv_heads < 1 or shape.num_heads % kv_heads:
            raise UnsupportedModelError(
                f"{shape.model_type} has num_heads={shape.num_heads}, which its num_kv_heads={kv_heads} must divide"
            )


def _check_heads(config: RunConfig, shape: ModelShape) -> None:
    t = config.topology
    p = config.parallel
    if shape.unlike_layers and (t.tp * t.pp > 1 or p.decode == "sliced" or p.implementation != "ds_ring"):
        raise UnsupportedModelError(
            f"{shape.model_type} has layers with unlike heads, which tp_size, pp_size, decode=sliced and other "
            f"implementations do not serve; take ring_degree, ulysses_degree or dp_size"
        )
    degree = config.parallel.ulysses_degree
    if shape.num_heads % degree:
        raise ConfigError(
            f"num_heads={shape.num_heads} is not divisible by ulysses_degree={degree}; "
            + suggest(valid_degrees(shape.num_heads), "use ring_degree instead")
        )
    sp = config.topology.sp
    for name in ("num_heads", "num_kv_heads") if config.parallel.decode == "sliced" else ():
        count = getattr(shape, name)
        if count % sp:
            raise ConfigError(
                f"{name}={count} is not divisible by the {sp} ranks that share a sequence, which decode=sliced needs; "
                + suggest(valid_degrees(shape.num_heads, shape.num_kv_heads), "use decode=whole")
            )


def _check_tensor_pipeline(config: RunConfig, shape: ModelShape) -> None:
    tp, pp = config.tp_size, config.parallel.pp_size
    for name in ("num_heads", "num_kv_heads", "intermediate_size", "hidden_size"):
        count = getattr(shape, name)
        if count % tp:
            fitting = valid_degrees(shape.num_heads, shape.num_kv_heads, shape.intermediate_size, shape.hidden_size)
            raise ConfigError(
                f"{name}={count} is not divisible by tp_size={tp}; " + suggest(fitting, "use pp_size instead")
            )
    if pp > shape.num_layers:
        raise ConfigError(f"pp_size={pp} is more than the model's {shape.num_layers} layers; the most is that many")


GPU_PEERS = {"context_parallel": "PyTorch has it", "yunchang": "its kernels are"}
"""What does not run on CPUs, and why."""


def _check_peer(config: RunConfig, shape: ModelShape) -> None:
    """What another implementation cannot do, and would leave out silently or fail at."""
    p, whose = config.parallel, config.parallel.implementation
    degrees = {name: getattr(p, name) for name in PEER_DEGREES[whose]}
    sharing = prod(degrees.values())
    if sharing == 1 or config.topology.world_size != sharing * p.dp_size:
        raise ConfigError(
            f"implementation={whose} shares sequences by {' and '.join(degrees)}, and goes with dp_size alone beside "
            f"{'them' if len(degrees) > 1 else 'it'}"
        )
    variants = {"auto", "pass_kv"} if whose == "yunchang" else {"auto", "gather_kv", "pass_kv"}
    settings = {
        "workload.mode": (config.workload.mode, {"full"}),
        "parallel.decode": (p.decode, {"auto", "whole"}),
        "parallel.ring_variant": (p.ring_variant, variants),
        "transport": (config.ring.transport, {"auto", "process_group"}),
        "interleave": (config.ring.interleave, {"auto", "off"}),
        "decode_graph": (config.ring.decode_graph, {"auto", "off"}),
    }
    for name, (value, possible) in settings.items():
        if value not in possible:
            raise ConfigError(f"implementation={whose} has no {name}={value}; {suggest(sorted(possible), '')}")
    if config.ring.in_flight > 2:
        raise ConfigError(f"implementation={whose} has no in_flight={config.ring.in_flight}; leave it out")
    kv_heads, ulysses = shape.num_kv_heads, p.ulysses_degree
    if whose == "deepspeed_ulysses" and kv_heads % ulysses and ulysses % kv_heads:
        raise ConfigError(
            f"implementation={whose}: num_kv_heads={kv_heads} and ulysses_degree={ulysses} must divide one another; "
            f"implementation=ds_ring takes any"
        )
    if whose == "yunchang" and kv_heads % ulysses:
        raise ConfigError(
            f"implementation={whose}: num_kv_heads={kv_heads} is not divisible by ulysses_degree={ulysses}; "
            f"use ring_degree instead, or implementation=ds_ring, which takes any"
        )
    windowed = any(window is not None for window in shape.windows)
    unseen = [name for name, asked in (("sliding windows", windowed), ("soft-capping", shape.softcap)) if asked]
    if unseen:
        raise UnsupportedModelError(
            f"implementation={whose} has no {' or '.join(unseen)}, which {shape.model_type} asks for; "
            f"implementation=ds_ring has"
        )


def check_workload(config: RunConfig, shape: ModelShape) -> None:
    """The rules of a benchmark's batch and lengths."""
    work, dp = config.workload, config.parallel.dp_size
    if work.batch_size < dp:
        raise ConfigError(
            f"batch_size={work.batch_size} leaves some of dp_size={dp} replicas without a sequence; "
            f"raise batch_size to {dp} or lower dp_size"
        )
    if work.micro_batches[0] < 1:
        raise ConfigError(f"micro_batch_sizes={work.micro_batches[0]} must be at least 1")
    longest = work.lengths[-1]
    if work.lengths[0] < 1:
        raise ConfigError(f"sweep={work.lengths[0]} must be at least 1")
    if shape.max_positions is not None and longest > shape.max_positions:
        name = "max_length" if longest == work.max_length else "sweep"
        raise ConfigError(
            f"{name}={longest} exceeds the model's max_position_embeddings={shape.max_positions}; "
            f"shorten it or extend the model's positions"
        )


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
