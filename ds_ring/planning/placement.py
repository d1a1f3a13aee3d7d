"""Where the ranks of an axis are: which of a group share a host, and which hand-overs cross from host to host.

Hosts hold equally many ranks, in rank order, as a launcher places them: rank r is on host r // per_host. The last axis
varies fastest (``parallel/topology.py``), so an axis of stride s has min(size, per_host / s) ranks of each group on a
host, where these divide one another. Where they do not, groups are counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from statistics import mean

from ds_ring.parallel.topology import AXES, Axis, Topology


@dataclass(frozen=True)
class AxisPlacement:
    """The groups of one axis on hosts; means are over all ranks, or over all groups.

    Attributes:
        size: ranks of a group.
        hosts: on how many hosts a group is, at most.
        near, far: mean number of other ranks of a rank's group that are on its host, and that are not.
        most_near, most_far: the same of the rank that has most.
        crossings: of a group's size - 1 hand-overs from each rank to the next one, how many leave a host; mean.
    """

    size: int
    hosts: int
    near: float
    far: float
    most_near: int
    most_far: int
    crossings: float

    @property
    def leaves_host(self) -> bool:
        return self.hosts > 1


@cache
def placement(topology: Topology, axis: Axis, per_host: int) -> AxisPlacement:
    """The groups of ``axis`` on hosts of ``per_host`` ranks."""
    size, stride = topology.size(axis), _stride(topology, axis)
    here = size if per_host >= topology.world_size else _ranks_on_a_host(size, stride, per_host)
    if here is not None:
        hosts = size // here
        return AxisPlacement(size, hosts, here - 1, size - here, here - 1, size - here, hosts - 1)
    firsts = (block + i for block in range(0, topology.world_size, size * stride) for i in range(stride))
    return _counted([tuple((first + i * stride) // per_host for i in range(size)) for first in firsts])


def _stride(topology: Topology, axis: Axis) -> int:
    """How far neighbours of a group are apart."""
    stride = 1
    for inner in AXES[AXES.index(axis) + 1 :]:
        stride *= topology.size(inner)
    return stride


def _ranks_on_a_host(size: int, stride: int, per_host: int) -> int | None:
    """Of each group, where all its hosts hold equally many of it; None where that is not so."""
    if stride % per_host == 0:
        return 1
    if per_host % stride:
        return None
    slots = per_host // stride
    return size if slots % size == 0 else slots if size % slots == 0 else None


def _counted(hosts_of_groups: list[tuple[int, ...]]) -> AxisPlacement:
    near, crossings = [], []
    for hosts in hosts_of_groups:
        near += [hosts.count(host) - 1 for host in hosts]
        crossings.append(sum(a != b for a, b in pairwise(hosts)))
    size = len(hosts_of_groups[0])
    far = [size - 1 - n for n in near]
    most_hosts = max(len(set(hosts)) for hosts in hosts_of_groups)
    return AxisPlacement(size, most_hosts, mean(near), mean(far), max(near), max(far), mean(crossings))


def describe(topology: Topology, per_host: int) -> str:
    """``ulysses 8 in a host, ring 2 over 2 hosts``, of the axes that have several ranks."""
    parts = []
    for axis in reversed(AXES):
        if topology.size(axis) > 1:
            found = placement(topology, axis, per_host)
            where = f"over {found.hosts} hosts" if found.leaves_host else "in a host"
            parts.append(f"{axis} {found.size} {where}")
    return ", ".join(parts) or "one rank"
