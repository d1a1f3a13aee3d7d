"""A rank's place on every axis of a mesh, and which groups are made for it."""

import pytest
import torch

from ds_ring.parallel.topology import AXES, Topology
from ds_ring.testing.threaded import ThreadedWorld
from ds_ring.transport.mesh import Mesh
from ds_ring.transport.solo import SoloTransport
from tests.helpers.worlds import in_mesh, to_next


@pytest.mark.parametrize("topology", [Topology(ring=2, ulysses=3), Topology(dp=2, pp=2, tp=2)], ids=Topology.label)
def test_every_rank_stands_where_its_coordinates_say_on_every_axis(topology):
    def work(mesh: Mesh):
        for axis in AXES:
            transport = mesh[axis]
            assert (transport.rank, transport.size) == (mesh.coordinate(axis), topology.size(axis))
            assert isinstance(transport, SoloTransport) == (topology.size(axis) == 1)
            peers = transport.all_gather_objects(mesh.rank)
            assert tuple(peers) == topology.group(axis, mesh.rank)
        return mesh["world"].rank

    assert in_mesh(topology, work) == list(range(topology.world_size))


def test_all_axes_share_one_account():
    def work(mesh: Mesh):
        mesh["ulysses"].all_to_all(torch.ones(2, 1))
        to_next(mesh["ring"], torch.ones(3), torch.empty(3)).wait()
        return dict(mesh.traffic.bytes_by_op)

    assert in_mesh(Topology(ring=2, ulysses=2), work) == [{"all_to_all": 4, "exchange": 12}] * 4


def test_groups_are_asked_for_in_the_same_order_on_every_rank():
    topology = Topology(dp=2, ring=2, ulysses=2)
    world = ThreadedWorld(topology.world_size)
    asked: list[list[object]] = [[] for _ in range(topology.world_size)]

    for rank in range(topology.world_size):

        def connect(axis, ranks, rank=rank):
            asked[rank].append((axis, ranks))
            return world.transport(axis, ranks, rank) if rank in ranks else None

        Mesh.build(topology, rank, connect)
    assert all(order == asked[0] for order in asked)
    assert all(len(ranks) > 1 for _, ranks in asked[0]), "a group of one needs no connection"
    assert ("ring", (0, 2)) in asked[0]
    assert ("world", tuple(range(8))) in asked[0]
