"""The rules of another implementation's layout, beside those that every layout must satisfy."""

from __future__ import annotations

from importlib.util import find_spec
from math import prod

from ds_ring.config import BASELINE_DEGREES, RunConfig
from ds_ring.errors import ConfigError, UnsupportedModelError
from ds_ring.model_dims import ModelDims
from ds_ring.parallel.degrees import suggest

GPU_ONLY = {"context_parallel": "PyTorch has it", "yunchang": "its kernels are"}
"""What does not run on CPUs, and why."""


def check(config: RunConfig, dims: ModelDims) -> None:
    """Refuse what another implementation cannot do, and would leave out silently or fail at; nothing where it is ours.

    Raises:
        ConfigError, UnsupportedModelError
    """
    if config.benchmark.implementation == "ds_ring":
        return
    p, whose = config.parallel, config.benchmark.implementation
    if dims.unlike_layers:
        raise UnsupportedModelError(
            f"implementation={whose}: {dims.model_type} has layers with unlike heads, which only ours serve; take "
            f"implementation=ds_ring"
        )
    degrees = {name: getattr(p, name) for name in BASELINE_DEGREES[whose]}
    sharing = prod(degrees.values())
    if sharing == 1 or config.topology.world_size != sharing * p.dp_size:
        raise ConfigError(
            f"implementation={whose} shares sequences by {' and '.join(degrees)}, and goes with dp_size alone beside "
            f"{'them' if len(degrees) > 1 else 'it'}"
        )
    variants = {"auto", "pass_kv"} if whose == "yunchang" else {"auto", "gather_kv", "pass_kv"}
    settings = {
        "benchmark.mode": (config.benchmark.mode, {"full"}),
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
    kv_heads, ulysses = dims.num_kv_heads, p.ulysses_degree
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
    windowed = any(window is not None for window in dims.windows)
    unseen = [name for name, asked in (("sliding windows", windowed), ("soft-capping", dims.softcap)) if asked]
    if unseen:
        raise UnsupportedModelError(
            f"implementation={whose} has no {' or '.join(unseen)}, which {dims.model_type} asks for; "
            f"implementation=ds_ring has"
        )


def check_device(config: RunConfig, device_type: str) -> None:
    """The rule of a layout by where it runs, ``"cuda"`` or ``"cpu"``."""
    whose = config.benchmark.implementation
    if whose in GPU_ONLY and device_type == "cpu":
        raise ConfigError(f"implementation={whose}: {GPU_ONLY[whose]} for GPUs alone; leave it out on CPUs")


def check_installed(config: RunConfig) -> None:
    """The rule of a layout by what is installed. A comparison leaves it to each layout's own launch: that a baseline
    is missing is a line of its table and does not keep it from the others."""
    if config.benchmark.implementation == "yunchang" and find_spec("yunchang") is None:
        raise ConfigError("implementation=yunchang: it is not installed; pip install yunchang")
