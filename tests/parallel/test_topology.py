"""Ranks, coordinates and groups."""

import itertools

import pytest

from ds_ring.parallel.topology import AXES, Topology

TOPOLOGIES = [
    Topology(),
    Topology(dp=4),
    Topology(tp=8, pp=2),
    Topology(ring=16),
    Topology(ring=2, ulysses=8),
    Topology(dp=2, ring=2, ulysses=2),
    Topology(dp=2, pp=3, tp=2),
    Topology(dp=2, pp=2, ring=3, ulysses=2, tp=2),
]
GROUP_AXES = ("dp", "pp", "ring", "ulysses", "tp", "sp", "world")


def name(topology: Topology) -> str:
    return topology.label()


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=name)
def test_coordinates_and_rank_are_inverse(topology):
    seen = set()
    for rank in range(topology.world_size):
        coordinates = topology.coordinates(rank)
        assert tuple(coordinates) == AXES
        assert all(0 <= coordinates[axis] < topology.size(axis) for axis in AXES)
        assert topology.rank(**coordinates) == rank
        seen.add(tuple(coordinates.values()))
    assert len(seen) == topology.world_size


@pytest.mark.parametrize("axis", GROUP_AXES)
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=name)
def test_groups_of_every_axis_partition_the_world(topology, axis):
    groups = topology.groups(axis)
    assert sorted(itertools.chain(*groups)) == list(range(topology.world_size))
    assert {len(group) for group in groups} == {topology.size(axis)}
    for rank in range(topology.world_size):
        assert rank in topology.group(axis, rank)
        assert topology.group(axis, rank)[topology.index(axis, rank)] == rank


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=name)
def test_the_place_in_a_group_is_the_coordinate(topology, axis):
    for rank in range(topology.world_size):
        assert topology.index(axis, rank) == topology.coordinates(rank)[axis]


def test_eight_way_tensor_parallel_in_two_stages_by_hand():
    topology = Topology(tp=8, pp=2)
    assert topology.world_size == 16
    assert topology.groups("tp") == [tuple(range(8)), tuple(range(8, 16))]
    assert topology.groups("pp") == [(r, r + 8) for r in range(8)]
    assert topology.groups("world") == [tuple(range(16))]
    assert topology.groups("dp") == topology.groups("sp") == [(r,) for r in range(16)]


def test_sixteen_way_sequence_parallel_by_hand():
    topology = Topology(ring=2, ulysses=8)
    assert topology.sp == 16
    assert topology.groups("ulysses") == [tuple(range(8)), tuple(range(8, 16))]
    assert topology.groups("ring") == [(r, r + 8) for r in range(8)]
    assert topology.groups("sp") == [tuple(range(16))]
    assert Topology(ring=16).groups("ring") == [tuple(range(16))]


def test_the_sequence_order_of_a_replica_is_ring_major():
    topology = Topology(dp=2, ring=2, ulysses=2)
    assert topology.groups("sp") == [(0, 1, 2, 3), (4, 5, 6, 7)]
    places = [(c["ring"], c["ulysses"]) for c in map(topology.coordinates, topology.groups("sp")[1])]
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize("axis", ["ulysses", "tp"])
@pytest.mark.parametrize(
    "topology", [Topology(dp=2, pp=2, tp=4), Topology(dp=2, ring=2, ulysses=4), Topology(ring=4, ulysses=2)], ids=name
)
def test_groups_that_talk_most_are_neighbouring_ranks(topology, axis):
    for group in topology.groups(axis):
        assert group == tuple(range(group[0], group[0] + len(group)))


@pytest.mark.parametrize(
    ("topology", "label"),
    [
        (Topology(), "single"),
        (Topology(dp=4), "dp4"),
        (Topology(tp=8, pp=2), "tp8_pp2"),
        (Topology(ring=2, ulysses=8), "ulysses8_ring2"),
        (Topology(dp=2, ring=4), "dp2_ring4"),
        (Topology(dp=2, tp=2, pp=2), "dp2_tp2_pp2"),
    ],
)
def test_labels(topology, label):
    assert topology.label() == label


def test_left_out_coordinates_are_zero():
    topology = Topology(dp=2, pp=2, tp=2)
    assert topology.rank() == 0
    assert topology.rank(pp=1) == 2
    assert topology.rank(dp=1, tp=1) == 5
