"""Ranks that hear of each other every second: who is gone, silent or ends with words is named on all."""

import json
import socket
import threading
import time

import pytest

from ds_ring.process import heartbeat
from ds_ring.process.heartbeat import Heartbeat
from ds_ring.process.network import LOOPBACK, listening
from tests.helpers.limits import HANG_S

NAMES = ["host1", "host1", "host2"]
SHORT_S = 0.6


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    for name, seconds in {"PERIOD_S": 0.1, "GONE_S": 0.3, "HEARD_S": 0.05, "PAUSE_S": HANG_S}.items():
        monkeypatch.setattr(heartbeat, name, seconds)


class World:
    """Three ranks that beat; ``said`` has the verdicts by rank."""

    def __init__(self, timeout_s, names=NAMES, stranger=None):
        self.said = {}
        self.ranks = [Heartbeat(rank, names, timeout_s, lambda why, r=rank: self.hear(r, why)) for rank in range(3)]
        with listening(LOOPBACK, 0) as listener:
            self.point = listener.getsockname()
            if stranger is not None:
                self.stranger = socket.create_connection(self.point)
                self.stranger.sendall(stranger)
            server = threading.Thread(target=self.ranks[0].serve, args=(listener, "token", 3))
            server.start()
            for rank in self.ranks[1:]:
                rank.join(*self.point, "token")
            server.join(HANG_S)

    def hear(self, rank, why):
        self.said[rank] = why

    def die(self, rank):
        """As a process that is killed: its connections end."""
        self.ranks[rank]._stopped.set()
        for peer in self.ranks[rank]._peers:
            peer.sock.shutdown(socket.SHUT_RDWR)

    def hang(self, rank):
        """As a process that is stopped: its connections stay, and nothing is sent or read."""
        self.ranks[rank]._stopped.set()

    def verdicts(self, *ranks):
        deadline = time.monotonic() + HANG_S
        while not set(ranks) <= self.said.keys() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        return self.said


def test_who_is_alive_is_left_alone():
    world = World(SHORT_S)
    time.sleep(3 * SHORT_S)
    assert world.said == {}
    assert [rank.silent(SHORT_S) for rank in world.ranks] == [[], [], []]


@pytest.mark.parametrize(("victim", "others"), [(2, (0, 1)), (0, (1, 2))])
def test_a_rank_that_is_gone_is_named_by_all_others_at_once(victim, others):
    world = World(0)
    world.die(victim)
    why = f"rank {victim} of {NAMES[victim]} ended without a word: killed, or the host is down"
    assert world.verdicts(*others) == dict.fromkeys(others, why)


@pytest.mark.parametrize(("victim", "others"), [(2, (0, 1)), (0, (1, 2))])
def test_a_rank_that_is_silent_is_named_by_all_others_after_the_time_out(victim, others):
    world = World(SHORT_S)
    begun = time.monotonic()
    world.hang(victim)
    why = f"nothing was heard of rank {victim} of {NAMES[victim]} for 0.6 s: stopped, or cut off from the network"
    assert world.verdicts(*others) == dict.fromkeys(others, why)
    assert time.monotonic() - begun > SHORT_S


def test_without_a_time_out_silence_ends_nothing():
    world = World(0)
    world.hang(2)
    time.sleep(3 * SHORT_S)
    assert world.said == {}


@pytest.mark.parametrize("speaker", [0, 1])
def test_last_words_reach_all_others(speaker):
    world = World(0)
    world.ranks[speaker].tell("the launcher is gone")
    others = {0, 1, 2} - {speaker}
    assert (
        world.verdicts(*others).items()
        >= dict.fromkeys(others, f"rank {speaker} of host1 ended: the launcher is gone").items()
    )


def test_ranks_that_are_done_may_end_in_any_order():
    world = World(SHORT_S)
    world.ranks[1].stop()
    world.die(1)
    time.sleep(3 * SHORT_S)
    assert world.said == {}
    world.ranks[0].stop()
    world.die(0)
    time.sleep(3 * SHORT_S)
    assert world.said == {}


@pytest.mark.parametrize("line", [b'["guess", 1]\n', b"GET / HTTP/1.0\n", b"{}\n", b"\xff\n", b""])
def test_a_stranger_is_no_rank(line):
    world = World(0, names=[], stranger=line)
    assert [peer.rank for peer in world.ranks[0]._peers] == [1, 2]
    world.die(2)
    assert world.verdicts(0, 1) == dict.fromkeys((0, 1), "rank 2 ended without a word: killed, or the host is down")


def test_a_process_that_was_held_up_itself_blames_nobody(monkeypatch):
    """A whole launch that a user stops and continues."""
    monkeypatch.setattr(heartbeat, "PAUSE_S", 0.5)
    world = World(2.0)
    now = time.monotonic
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now() + 100)
    time.sleep(1)
    assert world.said == {}


def test_messages_are_lines_of_json():
    near, far = socket.socketpair()
    far.setblocking(False)
    peer = heartbeat._Peer(1, far, 0.0)
    near.sendall(b'["be')
    assert peer.lines() == []
    near.sendall(b'at"]\n["end", "why"]\n')
    assert peer.lines() == [["beat"], ["end", "why"]]
    peer.send("end", "a\nb")
    assert json.loads(near.recv(100)) == ["end", "a\nb"]
    near.close()
    assert (peer.lines(), peer.gone_at > 0) == ([], True)
