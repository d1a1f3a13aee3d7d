"""Which axes of a mesh move their bytes by copy engine, from where every rank is."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ds_ring.config import TransportName
from ds_ring.errors import ConfigError
from ds_ring.parallel.topology import Axis, Topology
from ds_ring.transport.wire import sendable

SHARE_GPU = "DS_RING_SHARE_GPU"
"""Set to 1, tests may put several ranks on one GPU; never wanted otherwise."""
PULLED_AXES: tuple[Axis, ...] = ("ring", "ulysses", "pp", "weights")
"""What copy engines can serve: K/V, heads, hidden states from stage to stage, and weights."""


@sendable
@dataclass(frozen=True)
class Location:
    """Where a rank is.

    Attributes:
        host: equal on ranks that can hand each other memory.
        gpu: its GPU's UUID; None on a CPU.
        reaches: UUIDs of the GPUs whose memory it can read.
    """

    host: str
    gpu: str | None = None
    reaches: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def of(cls, device: torch.device) -> Location:
        boot = Path("/proc/sys/kernel/random/boot_id")
        host = f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"
        if device.type != "cuda":
            return cls(host)
        own = torch.cuda.current_device() if device.index is None else device.index
        others = [i for i in range(torch.cuda.device_count()) if i != own]
        reaches = frozenset(_uuid(i) for i in others if torch.cuda.can_device_access_peer(own, i))
        return cls(host, _uuid(own), reaches)


@dataclass(frozen=True)
class TransportSelection:
    """The axes that pull, and why other axes with more than one rank do not."""

    pulled: frozenset[Axis]
    reasons: dict[Axis, str]

    def describe(self) -> str:
        """One line for a person; empty where nothing is shared or handed on."""
        parts = [f"{axis} by copy engine" for axis in PULLED_AXES if axis in self.pulled]
        parts += [f"{axis} by process groups ({reason})" for axis, reason in self.reasons.items()]
        return "; ".join(parts)


def select_transports(
    wanted: TransportName, topology: Topology, locations: Sequence[Location], sharing: bool = False
) -> TransportSelection:
    """An axis pulls when all its groups can; every rank decides the same from the same ``locations``, by global rank.

    Raises:
        ConfigError: a copy engine was asked for by name where it cannot work.
    """
    pulled, reasons = set(), {}
    for axis in PULLED_AXES:
        if topology.size(axis) == 1:
            continue
        if wanted == "process_group":
            reasons[axis] = "as configured"
            continue
        obstacles = [_obstacle(group, locations, sharing) for group in topology.groups(axis)]
        obstacle = next((text for text in obstacles if text), None)
        if obstacle is None:
            pulled.add(axis)
        elif wanted == "copy_engine":
            raise ConfigError(
                f"transport=copy_engine cannot serve the {axis} axis: {obstacle}; take transport=auto, which uses "
                f"process groups there"
            )
        else:
            reasons[axis] = obstacle
    return TransportSelection(frozenset(pulled), reasons)


def _obstacle(group: Sequence[int], locations: Sequence[Location], sharing: bool) -> str | None:
    """Why these ranks cannot read each other's memory; None where they can."""
    for rank in group:
        if locations[rank].gpu is None:
            return f"rank {rank} has no CUDA GPU"
    hosts = {locations[rank].host for rank in group}
    if len(hosts) > 1:
        return f"ranks {', '.join(map(str, group))} are on {len(hosts)} hosts"
    for rank in group:
        for peer in group:
            location, other = locations[rank], locations[peer]
            if rank == peer:
                continue
            if location.gpu == other.gpu and not sharing:
                return f"ranks {rank} and {peer} are on one GPU"
            if location.gpu != other.gpu and other.gpu not in location.reaches:
                return f"rank {rank}'s GPU cannot read the memory of rank {peer}'s"
    return None


def sharing_a_gpu() -> bool:
    """Whether ranks were put on one GPU on purpose."""
    return os.environ.get(SHARE_GPU) == "1"


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
