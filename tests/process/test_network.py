"""Where ranks meet, and over which interface."""

import os
import socket

import pytest

from ds_ring.errors import ConfigError
from ds_ring.process import network
from ds_ring.process.hosts import named_ranks, world_of
from ds_ring.process.launcher import reserved_port
from ds_ring.process.network import MeetingPoint


@pytest.fixture
def launched(monkeypatch):
    """Sets what a launcher sets, and nothing else of it."""

    def of(**variables):
        for name in ("WORLD_SIZE", "CROSS_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", *network.INTERFACES):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"MASTER_PORT": "29500", **variables}.items():
            monkeypatch.setenv(name, value)

    return of


@pytest.mark.parametrize(
    ("variables", "alone"),
    [
        ({}, True),
        ({"WORLD_SIZE": "1"}, True),
        ({"WORLD_SIZE": "4", "CROSS_SIZE": "1", "LOCAL_SIZE": "4"}, True),
        ({"WORLD_SIZE": "4", "CROSS_SIZE": "2", "LOCAL_SIZE": "2"}, False),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, True),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, False),
        ({"WORLD_SIZE": "4"}, False),
    ],
    ids=str,
)
def test_whether_a_launch_has_other_hosts(variables, alone, launched):
    launched(**variables)
    assert network.one_host() is alone


def test_ranks_of_one_host_meet_on_its_loopback_interface_whatever_its_address(launched):
    launched(WORLD_SIZE="2", CROSS_SIZE="1", MASTER_ADDR="10.1.2.3")
    point = MeetingPoint.of_launch()
    assert point == MeetingPoint("127.0.0.1", 29500)
    assert point.own_address() == "127.0.0.1"
    network.use_interface(point.own_address())
    assert [os.environ[name] for name in network.INTERFACES] == ["lo", "=lo"]


def test_an_interface_that_the_user_names_stays(launched):
    launched(NCCL_SOCKET_IFNAME="eth7")
    network.use_interface("127.0.0.1")
    assert [os.environ[name] for name in network.INTERFACES] == ["lo", "eth7"]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.1.1", r"head is 127.0.1.1 on .*, where no other host reaches it; .* --master_addr"),
        (None, "the host name head does not resolve: "),
    ],
)
def test_a_master_that_other_hosts_cannot_reach_is_refused(address, said, launched, monkeypatch):
    launched(WORLD_SIZE="4", CROSS_SIZE="2", MASTER_ADDR="head")

    def resolve(name, *_, **__):
        if address is None:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]

    monkeypatch.setattr(network.socket, "getaddrinfo", resolve)
    with pytest.raises(ConfigError, match=said):
        MeetingPoint.of_launch()


def test_a_name_that_dns_cannot_have_is_refused():
    with pytest.raises(ConfigError, match=r"^the host name a\.\.b does not resolve: "):
        network.is_this_host("a..b")


def test_an_address_of_several_hosts_is_taken_as_it_is(launched):
    launched(WORLD_SIZE="4", CROSS_SIZE="2", MASTER_ADDR="10.1.2.3")
    assert MeetingPoint.of_launch() == MeetingPoint("10.1.2.3", 29500)


def test_only_one_listens_on_a_port():
    with reserved_port() as port, network.listening("127.0.0.1", port) as listener:
        assert listener.getsockname() == ("127.0.0.1", port)
        with (
            pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1: .*--master_port"),
            network.listening("127.0.0.1", port),
        ):
            pass


def test_ranks_are_named_with_their_hosts():
    names = ["a", "a", "b", "b"]
    assert named_ranks([1], []) == "rank 1"
    assert named_ranks([0, 1, 3], []) == "ranks 0, 1 and 3"
    assert named_ranks([3], names) == "rank 3 of b"
    assert named_ranks([1, 2, 3], names) == "rank 1 of a; ranks 2 and 3 of b"


def test_hosts_are_read_off_the_launchers_command_line():
    info = "--world_info=eyJhIjogWzAsIDFdLCAiYiI6IFswXX0="
    assert world_of(["python", "-u", "-m", "deepspeed.launcher.launch", info, "x.py"]) == {"a": [0, 1], "b": [0]}
    assert world_of(["python", "x.py"]) == {}
