"""The first meeting of ranks: all are there, or the missing ones are named in time."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from ds_ring.engine import rendezvous
from ds_ring.errors import ConfigError, TransportError
from ds_ring.process.launcher import reserved_port
from ds_ring.process.network import LOOPBACK, MeetingPoint, listening
from tests.helpers.limits import HANG_S

LATER = timedelta(seconds=HANG_S)


@pytest.fixture
def point():
    with reserved_port() as port:
        yield MeetingPoint(LOOPBACK, port)


def outcomes(point, ranks, size, start_timeout_s):
    """Of every rank what ``meet`` gives it, or raises."""

    def one(rank):
        try:
            return rendezvous.meet(point, rank, size, start_timeout_s, LATER)
        except (ConfigError, TransportError) as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks))


def test_all_ranks_share_a_store(point):
    stores = outcomes(point, range(3), 3, HANG_S)
    stores[2].set("said", "by rank 2")
    assert [store.get("said") for store in stores] == [b"by rank 2"] * 3
    assert stores[1].timeout == LATER


@pytest.mark.parametrize("there", [(0,), (0, 1), (1, 2)], ids=str)
def test_ranks_that_do_not_come_are_named_by_all_in_time(there, point, monkeypatch):
    monkeypatch.setattr(rendezvous, "rank_names", lambda: ["here", "here", "far"])
    begun = time.monotonic()
    errors = outcomes(point, there, 3, 0.5)
    assert time.monotonic() - begun < 5
    missing = {(0,): "rank 1 of here; rank 2 of far", (0, 1): "rank 2 of far", (1, 2): "rank 0 of here"}[there]
    for error in errors:
        assert type(error) is TransportError
        assert str(error).startswith(f"{missing} did not start within 0.5 s of the others; ")
        assert "start_timeout_s" in str(error)
        assert ("no answer from 127.0.0.1" in str(error)) == (0 not in there)


def test_a_port_that_something_else_listens_on_is_refused_by_rank_0(point):
    with listening(point.address, point.port):
        (error,) = outcomes(point, [0], 1, HANG_S)
    assert type(error) is ConfigError
    assert str(error).startswith(f"cannot listen on port {point.port} of 127.0.0.1: Address already in use; ")


def test_a_second_launch_on_a_port_is_refused_and_the_first_is_unharmed(point):
    first = outcomes(point, range(2), 2, HANG_S)
    errors = outcomes(point, range(2), 2, HANG_S)
    assert [type(error) for error in errors] == [ConfigError] * 2
    assert f"port {point.port} of 127.0.0.1 is used by another launch that has a rank 1" in str(errors[1])
    first[1].set("said", "later")
    assert first[0].get("said") == b"later"


def test_a_host_that_ends_meanwhile_is_named_at_once(point, monkeypatch):
    monkeypatch.setattr(rendezvous, "lost_hosts", lambda: ["host2"])
    errors = outcomes(point, [0], 2, HANG_S)
    assert str(errors[0]) == "host2 ended before all ranks had started; see what was said there"
