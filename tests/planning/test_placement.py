"""Which ranks of an axis share a host: the closed form against ranks that are counted one by one."""

from __future__ import annotations

from itertools import pairwise
from statistics import mean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_ring.parallel.topology import AXES, Topology
from ds_ring.planning.cards import CARDS, card_of
from ds_ring.planning.placement import describe, placement


@given(
    sizes=st.tuples(*[st.integers(1, 4)] * len(AXES)), per_host=st.integers(1, 24), axis=st.sampled_from(AXES),
)  # fmt: skip
def test_it_is_what_counting_gives(sizes, per_host, axis):
    topology = Topology(**dict(zip(AXES, sizes, strict=True)))
    hosts = [[rank // per_host for rank in group] for group in topology.groups(axis)]
    near = [group.count(host) - 1 for group in hosts for host in group]
    far = [len(group) - 1 - n for group in hosts for n in [group.count(host) - 1 for host in group]]
    found = placement(topology, axis, per_host)
    assert (found.near, found.far) == pytest.approx((mean(near), mean(far)))
    assert (found.most_near, found.most_far) == (max(near), max(far))
    assert found.hosts == max(len(set(group)) for group in hosts)
    assert found.crossings == pytest.approx(mean(sum(a != b for a, b in pairwise(group)) for group in hosts))


@pytest.mark.parametrize(
    ("topology", "per_host", "words"),
    [
        (Topology(ring=2, ulysses=8), 8, "ulysses 8 in a host, ring 2 over 2 hosts"),
        (Topology(ring=2, ulysses=8), 16, "ulysses 8 in a host, ring 2 in a host"),
        (Topology(pp=2, tp=8), 8, "tp 8 in a host, pp 2 over 2 hosts"),
        (Topology(ring=16), 4, "ring 16 over 4 hosts"),
        (Topology(), 8, "one rank"),
    ],
)
def test_in_words(topology, per_host, words):
    assert describe(topology, per_host) == words


@pytest.mark.parametrize("variable", ["LOCAL_SIZE", "LOCAL_WORLD_SIZE"])
def test_a_launch_has_as_many_ranks_a_host_as_its_launcher_says(variable, monkeypatch):
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    alone = card_of(torch.device("cpu"))
    assert alone.per_host == CARDS["CPU"].per_host
    monkeypatch.setenv(variable, "4")
    assert card_of(torch.device("cpu")).per_host == 4
    assert card_of(torch.device("cpu")).memory_gib == pytest.approx(alone.memory_gib / 4)
