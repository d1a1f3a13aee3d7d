"""Ranks that hear of each other every second: who is gone, silent or ends with words is named on all."""

import json
import socket
import threading
import time

import pytest

from ds_ring.errors import ConfigError, DisagreementError, TransportError, has_lost_a_rank
from ds_ring.process import heartbeat, pauses
from ds_ring.process.heartbeat import Heartbeat
from ds_ring.process.heartbeat_peer import LONGEST_LINE, MOST_LETTERS, Peer
from ds_ring.process.network import LOOPBACK, listening
from tests.helpers.limits import HANG_S

NAMES = ["host1", "host1", "host2"]
SHORT_S = 0.6


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    for name, seconds in {"PERIOD_S": 0.1, "GONE_S": 0.3, "HEARD_S": 0.05}.items():
        monkeypatch.setattr(heartbeat, name, seconds)
    monkeypatch.setattr(pauses, "PAUSE_S", HANG_S)


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


WHY = "ValueError: no such layer"
OF_1 = f"rank 1 of host1 ended: {WHY}"
KILLED_1 = "rank 1 of host1 ended without a word: killed, or the host is down"


@pytest.mark.parametrize(
    ("ends", "why"),
    [
        # (rank, what it says, whether it lost another), in turn
        ([(1, WHY, False)], OF_1),
        ([(1, WHY, False), (2, "Connection closed by peer", True)], OF_1),
        ([(2, "Connection closed by peer", True), (1, WHY, False)], OF_1),
        ([(2, None, False), (1, WHY, False)], OF_1),  # the launcher of its host ends the second
        ([(2, "Connection closed by peer", True), (1, None, False)], KILLED_1),
        ([(1, None, False), (2, "Connection closed by peer", True)], KILLED_1),
    ],
    ids=str,
)
def test_a_rank_that_fails_is_named_with_its_own_reason_and_before_what_comes_of_it(ends, why):
    world = World(0)
    for rank, said, lost in ends:
        if said is not None:
            world.ranks[rank].say_why(said, lost)
        world.die(rank)
    assert world.verdicts(0)[0] == why


def test_a_rank_that_only_hears_rank_0_hears_whom_that_lost():
    world = World(0)
    world.ranks[0].end = lambda why: None
    world.die(1)
    deadline = time.monotonic() + HANG_S
    while not world.ranks[0]._peers[0].gone_at and time.monotonic() < deadline:
        time.sleep(0.01)
    world.ranks[0].say_why("Connection closed by peer", True)
    assert world.verdicts(2)[2] == f"rank 0 of host1 ended: {KILLED_1}"


def test_who_says_why_has_ended_even_where_its_connection_stays():
    world = World(0)
    world.ranks[2].say_why(WHY, False)
    assert world.verdicts(0)[0] == f"rank 2 of host2 ended: {WHY}"


class DistNetworkError(RuntimeError):
    """By the name of PyTorch's."""


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (TransportError("rank 0 ended"), True),
        (DisagreementError("rank 1 has another"), False),
        (ConfigError("no"), False),
        (RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (DistNetworkError("the server has ended"), True),
    ],
    ids=repr,
)
def test_which_errors_come_of_another_ranks_end(error, lost):
    assert has_lost_a_rank(error) is lost


@pytest.mark.parametrize(
    "line", [b"no JSON", b"\xff", b"{}", b"[]", b"7", b'["end"]', b'["beat", 1]', b'["guess"]', b"[" * 60_000], ids=str
)
def test_what_no_rank_sends_is_the_end_of_a_connection(line):
    near, far = socket.socketpair()
    far.setblocking(False)
    peer, found = Peer(1, far, 0.0), []
    near.sendall(b'["beat"]\n' + line + b'\n["beat"]\n')
    while not peer.gone_at:
        found += peer.lines()
    assert found == [["beat"]]


def test_a_line_without_an_end_is_the_end_of_a_connection():
    world = World(0)
    sock = world.ranks[2]._peers[0].sock
    sock.setblocking(True)
    sock.sendall(b"x" * (LONGEST_LINE + 1))
    assert world.verdicts(0, 1, 2)[0] == "rank 2 of host2 ended without a word: killed, or the host is down"


def test_what_a_full_buffer_does_not_take_is_sent_later_and_beats_do_not_pile_up():
    near, far = socket.socketpair()
    for sock in (near, far):
        sock.setblocking(False)
    sender, receiver = Peer(1, near, 0.0), Peer(0, far, 0.0)
    while not sender.unsent:
        sender.send("said", "x" * 10 * MOST_LETTERS, "")
    waiting = len(sender.unsent)
    for _ in range(1000):
        sender.send("beat")
    assert len(sender.unsent) == waiting
    sender.send("end", "why")
    found = []
    while sender.unsent:
        found += receiver.lines()
        sender.send("beat")
    sender.send("beat")
    found += receiver.lines()
    assert receiver.gone_at == 0
    assert {word for message in found for word in message} == {"said", "x" * MOST_LETTERS, "", "end", "why", "beat"}


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
    monkeypatch.setattr(pauses, "PAUSE_S", 0.5)
    world = World(2.0)
    now = time.monotonic
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now() + 100)
    time.sleep(1)
    assert world.said == {}


def test_messages_are_lines_of_json():
    near, far = socket.socketpair()
    far.setblocking(False)
    peer = Peer(1, far, 0.0)
    near.sendall(b'["be')
    assert peer.lines() == []
    near.sendall(b'at"]\n["end", "why"]\n')
    assert peer.lines() == [["beat"], ["end", "why"]]
    peer.send("end", "a\nb")
    assert json.loads(near.recv(100)) == ["end", "a\nb"]
    near.close()
    assert (peer.lines(), peer.gone_at > 0) == ([], True)
