"""Every second each rank tells rank 0, and rank 0 each rank, that it is alive. Who is not, is named on all hosts.

Launchers notice processes of their own host. A rank on another host that is killed, a host that is stopped, a link that
is down leave the others waiting: for ``timeout_s``, or in user code for ever. Here a connection that ends means a rank
that is gone, and one that is silent a rank that is stopped or cut off. A rank that fails says why before it ends. The
verdict of rank 0 goes to all; who cannot hear rank 0 comes to one of its own.

Threads and sockets of their own: nothing of this is in the way of a pass. What is sent is lines of text.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ds_ring.errors import has_lost_a_rank, in_one_line
from ds_ring.process.heartbeat_peer import Peer
from ds_ring.process.hosts import named_ranks
from ds_ring.process.network import listening
from ds_ring.process.pauses import Pauses
from ds_ring.utils.streams import last_words

PERIOD_S = 1.0
CONNECT_S = 60.0
GONE_S = 3.0
"""From the end of a rank's connection to the verdict: time for the launcher and for the rank's own last words."""
HEARD_S = 0.3
"""Between last words and the end: a connection that ends with something unread loses what it sent."""


@dataclass
class Heartbeat:
    """One rank's side.

    Attributes:
        names: the host of every rank; empty where all are on one.
        timeout_s: silence that ends the launch; 0: none does.
        end: called with the verdict, on every rank that hears of it, in the thread of the watch.
    """

    rank: int
    names: Sequence[str]
    timeout_s: float
    end: Callable[[str], None]
    _peers: list[Peer] = field(default_factory=list)
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _pauses: Pauses = field(default_factory=Pauses)

    def serve(self, listener: socket.socket, token: str, size: int) -> None:
        """On rank 0: wait for all others to connect, then watch them."""
        listener.settimeout(CONNECT_S)
        while len(self._peers) < size - 1:
            sock, _ = listener.accept()
            sock.settimeout(PERIOD_S)
            with suppress(OSError, ValueError, RecursionError), sock.makefile("rb", buffering=0) as file:
                # Unbuffered: what it says behind its first line is for ``Peer.lines``.
                told = json.loads(file.readline(1000))
                if told in ([token, rank] for rank in range(1, size)):
                    self._add(told[1], sock)
                    continue
            sock.close()  # a stranger
        self._run()

    def join(self, address: str, port: int, token: str) -> None:
        """On another rank: connect to rank 0, then watch it."""
        sock = socket.create_connection((address, port), CONNECT_S)
        sock.sendall((json.dumps([token, self.rank]) + "\n").encode())
        self._add(0, sock)
        self._run()

    def tell(self, why: str) -> None:
        """Say on all ranks why this one ends; they end at once."""
        self._last("end", f"{named_ranks([self.rank], self.names)} ended: {why}")

    def say_why(self, why: str, lost_another: bool) -> None:
        """Say on all ranks why this one ends; they end in ``GONE_S``, by which time their launcher has ended them, or
        they have an error of their own.

        ``lost_another``: it ends since another rank did. Who has heard of that one names it instead.
        """
        if lost_another and (gone := self._gone_verdict()):
            why = gone
        self._last("said", why, "lost" if lost_another else "")

    def _last(self, *words: str) -> None:
        self._stopped.set()
        for peer in list(self._peers):
            peer.send(*words)
        if self._peers:
            time.sleep(HEARD_S)

    def stop(self) -> None:
        """This rank is done: its end means nothing."""
        self._stopped.set()
        for peer in list(self._peers):
            peer.send("bye")

    def silent(self, beyond_s: float) -> list[int]:
        """The ranks that this one should have heard of, and has not for ``beyond_s`` seconds."""
        now = time.monotonic()
        return [peer.rank for peer in self._peers if now - peer.heard_at > beyond_s]

    def _add(self, rank: int, sock: socket.socket) -> None:
        sock.setblocking(False)
        peer = Peer(rank, sock, time.monotonic())
        self._peers.append(peer)
        self._selector.register(sock, selectors.EVENT_READ, peer)

    def _run(self) -> None:
        threading.Thread(target=self._watch, daemon=True, name="heartbeat").start()

    def _watch(self) -> None:
        beat_at = time.monotonic()
        while not self._stopped.is_set() and self._peers:
            if time.monotonic() >= beat_at:
                beat_at = time.monotonic() + PERIOD_S
                for peer in self._peers:
                    peer.send("beat")
            for key, _ in self._selector.select(PERIOD_S / 2):
                if verdict := self._read(key.data):
                    return self._judge(verdict)
            now = time.monotonic()
            if self._pauses.look():
                for peer in self._peers:
                    peer.heard_at = now
            if verdict := self._verdict(now):
                return self._judge(verdict)
        return None

    def _read(self, peer: Peer) -> str | None:
        for word, *more in peer.lines():
            if word == "end":
                return more[0]
            if word == "bye":
                self._drop(peer)
                return None
            if word == "said":
                peer.why, peer.lost_another, peer.gone_at = more[0], more[1] == "lost", time.monotonic()
        if peer.gone_at:
            self._selector.unregister(peer.sock)
        return None

    def _drop(self, peer: Peer) -> None:
        self._selector.unregister(peer.sock)
        self._peers.remove(peer)

    def _verdict(self, now: float) -> str | None:
        if any(peer.gone_at and now - peer.gone_at > GONE_S for peer in self._peers):
            return self._gone_verdict()
        if self.timeout_s and (silent := self.silent(self.timeout_s)):
            return (
                f"nothing was heard of {named_ranks(silent, self.names)} for {self.timeout_s:g} s: stopped, or cut off "
                f"from the network"
            )
        return None

    def _gone_verdict(self) -> str:
        """The nearest to the cause that is known of the ranks that are gone: what one said of itself; else those that
        said nothing; else what came of that to others. Empty where none is gone."""
        gone = [peer for peer in self._peers if peer.gone_at]
        for peer in gone:
            if peer.why and not peer.lost_another:
                return f"{named_ranks([peer.rank], self.names)} ended: {peer.why}"
        if silent := [peer.rank for peer in gone if not peer.why]:
            return f"{named_ranks(silent, self.names)} ended without a word: killed, or the host is down"
        return f"{named_ranks([gone[0].rank], self.names)} ended: {gone[0].why}" if gone else ""

    def _judge(self, verdict: str) -> None:
        for peer in self._peers if self.rank == 0 else ():
            peer.send("end", verdict)
        time.sleep(HEARD_S)
        self.end(verdict)


_own: list[Heartbeat] = []
"""This process's, once it is connected."""


def start(
    rank: int,
    size: int,
    names: Sequence[str],
    own_address: str,
    timeout_s: float,
    told: Callable[[Any], list[Any]],
) -> None:
    """From here on this process ends when another rank does without a word, or is silent for ``timeout_s``. Collective;
    a process's first call counts.

    Args:
        told: gathers a small value of every rank.
    """
    if _own:
        return
    _own.append(heartbeat := Heartbeat(rank, names, timeout_s, _end_process(rank)))
    atexit.register(_leave)
    if rank == 0:
        token = os.urandom(16).hex()
        with listening(own_address, 0) as listener:
            told((*listener.getsockname()[:2], token))
            heartbeat.serve(listener, token, size)
    else:
        address, port, token = told(None)[0]
        heartbeat.join(address, port, token)


def tell(why: str) -> None:
    """As ``Heartbeat.tell`` of this process; nothing before it is connected."""
    for heartbeat in _own:
        heartbeat.tell(why)


def say_why(why: str, lost_another: bool) -> None:
    """As ``Heartbeat.say_why`` of this process."""
    for heartbeat in _own:
        heartbeat.say_why(why, lost_another)


def stop() -> None:
    """As ``Heartbeat.stop`` of this process."""
    for heartbeat in _own:
        heartbeat.stop()


def running() -> bool:
    """Whether this process is connected, and has not been stopped."""
    return any(not heartbeat._stopped.is_set() for heartbeat in _own)


def _leave() -> None:
    """At the interpreter's end: what nobody caught is said to all ranks."""
    error = getattr(sys, "last_value", None)
    stop() if error is None else say_why(in_one_line(error), has_lost_a_rank(error))


def _end_process(rank: int) -> Callable[[str], None]:
    def end(verdict: str) -> None:
        last_words(f"failed on rank {rank}: {verdict}")
        os._exit(1)

    return end
