"""Where the copy engine is taken, from where ranks are; no GPU is needed to decide."""

import os
import threading
from functools import partial

import pytest
import torch

from ds_ring.engine.connect import local_device
from ds_ring.errors import ConfigError, TransportError
from ds_ring.parallel.topology import Topology
from ds_ring.transport.mesh import Mesh
from ds_ring.transport.process_group import ProcessGroupTransport
from ds_ring.transport.select import SHARE_GPU, Location, select_transports
from ds_ring.transport.solo import SoloTransport
from tests.helpers.process_group_world import ProcessGroupWorld


def hosts(*gpus: int) -> list[Location]:
    """Hosts of so many GPUs each, which all reach each other inside."""
    locations = []
    for host, count in enumerate(gpus):
        names = [f"{host}-{i}" for i in range(count)]
        locations += [Location(str(host), name, frozenset(names) - {name}) for name in names]
    return locations


@pytest.mark.parametrize(
    ("topology", "locations", "pulled", "said"),
    [
        (Topology(ring=4), hosts(4), {"ring"}, "ring by copy engine"),
        (Topology(ulysses=2), hosts(2), {"ulysses"}, "ulysses by copy engine"),
        (Topology(ring=2, ulysses=2), hosts(4), {"ring", "ulysses"}, "ring by copy engine; ulysses by copy engine"),
        (Topology(ring=2, ulysses=4), hosts(4, 4), {"ulysses"},
         "ulysses by copy engine; ring by process groups (ranks 0, 4 are on 2 hosts)"),
        (Topology(dp=2, ring=2), hosts(2, 2), {"ring"}, "ring by copy engine"),
        (Topology(dp=2, ring=2), hosts(2, 1, 1), set(), "ring by process groups (ranks 2, 3 are on 2 hosts)"),
        (Topology(ring=2), [Location("a")] * 2, set(), "ring by process groups (rank 0 has no CUDA GPU)"),
        (Topology(ring=2), [Location("a", "x"), Location("a", "y", frozenset("x"))], set(),
         "ring by process groups (rank 0's GPU cannot read the memory of rank 1's)"),
        (Topology(ring=2), [Location("a", "x", frozenset("y")), Location("a", "y")], set(),
         "ring by process groups (rank 1's GPU cannot read the memory of rank 0's)"),
        (Topology(ring=2), [Location("a", "x")] * 2, set(), "ring by process groups (ranks 0 and 1 are on one GPU)"),
        (Topology(tp=2, pp=2), hosts(4), {"pp"}, "pp by copy engine"),
        (Topology(tp=2), hosts(2), set(), ""),
        (Topology(dp=2), hosts(1, 1), set(), ""),
    ],
)  # fmt: skip
def test_auto_takes_the_copy_engine_where_all_groups_of_an_axis_can(topology, locations, pulled, said):
    choice = select_transports("auto", topology, locations)
    assert choice.pulled == pulled
    assert choice.describe() == said
    if "process groups" not in said:
        assert select_transports("copy_engine", topology, locations) == choice
    else:
        reason = said.partition("(")[2].rstrip(")")
        with pytest.raises(ConfigError, match="transport=copy_engine cannot serve the ring axis") as caught:
            select_transports("copy_engine", topology, locations)
        assert reason in str(caught.value)
        assert "take transport=auto" in str(caught.value)


def test_process_groups_may_be_asked_for():
    choice = select_transports("process_group", Topology(ring=2), hosts(2))
    assert not choice.pulled
    assert choice.describe() == "ring by process groups (as configured)"


def test_ranks_share_a_gpu_only_on_purpose():
    locations = [Location("a", "x")] * 3
    assert select_transports("auto", Topology(ring=3), locations, sharing=True).pulled == {"ring"}
    assert not select_transports("auto", Topology(ring=3), locations).pulled


@pytest.mark.parametrize(("asked", "gpus", "device"), [(None, 4, "cuda:3"), ("0", 4, "cuda:3"), ("1", 2, "cuda:1")])
def test_local_rank_is_the_gpu_unless_sharing_is_asked_for(monkeypatch, asked, gpus, device):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv(SHARE_GPU, raising=False)
    if asked is not None:
        monkeypatch.setenv(SHARE_GPU, asked)
    assert local_device() == torch.device(device)


@pytest.mark.parametrize("environment", [{"LOCAL_RANK": "2"}, {"LOCAL_RANK": "0", "LOCAL_SIZE": "3"}], ids=str)
def test_more_ranks_than_gpus_are_refused_on_all_that_the_launcher_started(environment, monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"^3 ranks were launched on .*, which has 2 GPUs to give; launch with --num"):
        local_device()


def test_a_place_without_a_gpu_has_the_host_of_its_neighbours():
    one, other = Location.of(torch.device("cpu")), Location.of(torch.device("cpu"))
    assert one == other
    assert one.gpu is None
    assert os.uname().nodename in one.host


class _Broken(SoloTransport):
    """A copy engine whose self-test fails on one rank."""

    def __init__(self, control, device):
        super().__init__()
        self.rank, self.size, self._control = control.rank, control.size, control

    def self_test(self, device):
        if self.rank == 1:
            raise RuntimeError("cuStreamWaitValue32_v2 failed with CUDA error 801")

    def barrier(self):
        self._control.barrier()


class _BrokenGroup(_Broken):
    """Ranks of a group meet in the self-test, which fails on both ranks of one group."""

    def __init__(self, meetings, error, control, device):
        super().__init__(control, device)
        self._meeting, self._error = meetings[control._ranks], error if control._ranks == (1, 3) else None

    def self_test(self, device):
        self._meeting.wait(10.0)
        if self._error is not None:
            raise self._error


class TestACopyEngineThatFailsItsSelfTest:
    TEXT = "ring: rank 1: cuStreamWaitValue32_v2 failed with CUDA error 801"

    def meshes(self, monkeypatch, broken=_Broken, ulysses=1, **options):
        monkeypatch.setattr("ds_ring.transport.mesh._pulling", broken)
        topology, pulled = Topology(ring=2, ulysses=ulysses), frozenset({"ring", "ulysses"})
        world = ProcessGroupWorld(topology.world_size)
        return world.run(lambda _: Mesh.from_process_groups(topology, pulled, **options))

    def test_process_groups_take_over_on_every_rank_with_one_warning(self, monkeypatch, caplog):
        for mesh in self.meshes(monkeypatch):
            assert type(mesh["ring"]) is ProcessGroupTransport
            assert mesh.traffic is mesh["ring"].traffic
        assert [record.message for record in caplog.records if record.name == "ds_ring"] == [
            f"K/V, heads and hidden states go by process groups, not by copy engine: {self.TEXT}"
        ]

    @pytest.mark.parametrize("kind", [RuntimeError, OSError, ImportError, AttributeError])
    def test_groups_in_which_it_works_do_not_test_the_next_axis_alone(self, kind, monkeypatch, caplog):
        meetings = {ranks: threading.Barrier(2) for ranks in [(0, 1), (2, 3), (0, 2), (1, 3)]}
        broken = partial(_BrokenGroup, meetings, kind("no copy engine"))
        for mesh in self.meshes(monkeypatch, broken, ulysses=2):
            assert {type(mesh[axis]) for axis in ("ring", "ulysses")} == {ProcessGroupTransport}
        (said,) = [record.message for record in caplog.records if record.name == "ds_ring"]
        assert said.endswith("by copy engine: ring: rank 1: no copy engine")

    def test_one_that_was_asked_for_by_name_is_an_error_everywhere(self, monkeypatch):
        with pytest.raises(TransportError, match=f"^transport=copy_engine does not work here: {self.TEXT}$"):
            self.meshes(monkeypatch, insist=True)
