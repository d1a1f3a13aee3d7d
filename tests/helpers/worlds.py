"""Worlds of ranks that are threads."""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from ds_ring.parallel.topology import Axis, Topology
from ds_ring.testing.threaded import ThreadedWorld
from ds_ring.transport.base import Pending, Transport
from ds_ring.transport.mesh import Mesh
from tests.helpers.cores import share_a_core
from tests.helpers.limits import HANG_S

T = TypeVar("T")


def in_group(size: int, work: Callable[[Transport], T], timeout_s: float = HANG_S) -> list[T]:
    """``work(transport)`` on every rank of one group; results in rank order."""
    world = ThreadedWorld(size, timeout_s)

    def on_rank(rank: int) -> T:
        share_a_core()
        return work(world.transport("world", range(size), rank))

    return world.run(on_rank)


def mesh_of(world: ThreadedWorld, topology: Topology, rank: int) -> Mesh:
    """The mesh of one rank over ``ThreadedTransport``."""

    def connect(axis: Axis, ranks: tuple[int, ...]) -> Transport | None:
        return world.transport(axis, ranks, rank) if rank in ranks else None

    return Mesh.build(topology, rank, connect)


MakeMesh = Callable[[ThreadedWorld, Topology, int], Mesh]


def in_mesh(
    topology: Topology, work: Callable[[Mesh], T], timeout_s: float = HANG_S, make_mesh: MakeMesh = mesh_of
) -> list[T]:
    """``work(mesh)`` on every rank of a new world; results in rank order."""
    world = ThreadedWorld(topology.world_size, timeout_s)

    def on_rank(rank: int) -> T:
        share_a_core()
        return work(make_mesh(world, topology, rank))

    return world.run(on_rank)


def to_next(transport: Transport, tensor: Tensor, received: Tensor) -> Pending:
    """Start an exchange round the ring."""
    before, after = (transport.rank - 1) % transport.size, (transport.rank + 1) % transport.size
    return transport.exchange([(after, tensor)], [(before, received)])
