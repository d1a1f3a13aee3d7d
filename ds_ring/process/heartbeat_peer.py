"""A connection between two ranks' heartbeats, which sends and reads messages: lines with a JSON list of words."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

LONGEST_LINE = 65536
MOST_LETTERS = 2000
"""Of one word that is sent, so that a line is shorter than the longest that is read."""

MESSAGES = {"beat": 1, "bye": 1, "end": 2, "said": 3}
"""How many words each has. "end" has a verdict; "said" why the sender ends, and "lost" where it lost another rank."""


@dataclass
class Peer:
    """The other end of a connection: rank 0, or another rank as rank 0 sees it."""

    rank: int
    sock: socket.socket
    heard_at: float
    read: bytes = b""
    unsent: bytes = b""
    gone_at: float = 0.0
    why: str = ""
    """Its own last words."""
    lost_another: bool = False
    """Whether they say no more than that it lost another rank."""
    _sending: threading.Lock = field(default_factory=threading.Lock)

    def send(self, *words: str) -> None:
        """From any thread: last words come from another one than beats."""
        # A peer that is stopped reads nothing: what does not fit any longer waits, and so do beats.
        with self._sending, suppress(OSError):  # its end, and a full buffer, show where its lines are read
            if not self.unsent or words != ("beat",):
                self.unsent += (json.dumps([word[:MOST_LETTERS] for word in words]) + "\n").encode()
            self.unsent = self.unsent[self.sock.send(self.unsent) :]

    def lines(self) -> list[list[str]]:
        """What has come, whole lines. An end of the connection sets ``gone_at``, as does what no rank sends."""
        try:
            data = self.sock.recv(65536)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            self.gone_at = time.monotonic()
            return []
        self.heard_at = time.monotonic()
        *whole, self.read = (self.read + data).split(b"\n")
        found: list[list[str]] = []
        for line in whole:
            if (words := _words_of(line)) is None:
                self.gone_at = time.monotonic()
                return found
            found.append(words)
        if len(self.read) > LONGEST_LINE:
            self.gone_at = time.monotonic()
        return found


def _words_of(line: bytes) -> list[str] | None:
    """The words of a message; None where it is none."""
    try:
        words = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_message = isinstance(words, list) and all(isinstance(word, str) for word in words)
    return words if is_message and len(words) == MESSAGES.get(words[0] if words else "") else None
