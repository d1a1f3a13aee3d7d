"""The first meeting of a launch's ranks: within ``start_timeout_s``, or the missing ones are named.

A rank that fails before it connects leaves no trace on other hosts. Their ranks would wait for it as long as for a
forward, half an hour by default.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore

from ds_ring.errors import ConfigError, TransportError
from ds_ring.process.hosts import named_ranks, rank_names
from ds_ring.process.launch_tree import lost_hosts
from ds_ring.process.network import MeetingPoint, listening

PERIOD_S, LOOK_S = 0.1, 1.0


def meet(point: MeetingPoint, rank: int, size: int, start_timeout_s: float, timeout: timedelta) -> TCPStore:
    """The store of this launch, once all ranks are there. Rank 0 serves it, at ``point`` alone.

    Args:
        rank, size: this rank, and how many there are.
        timeout: of what is asked of the store later.

    Raises:
        ConfigError: the port is taken. TransportError: ranks that are not there in time, by their numbers and hosts.
    """
    deadline = time.monotonic() + start_timeout_s
    store = _serve(point, size) if rank == 0 else _reach(point, size, start_timeout_s)
    if store.add(f"start/{rank}", 1) > 1:
        raise ConfigError(
            f"port {point.port} of {point.address} is used by another launch that has a rank {rank}; give the launcher "
            f"--master_port N"
        )
    missing, look_at = list(range(size)), 0.0
    while missing := _still_missing(store, missing):
        if time.monotonic() > deadline:
            raise TransportError(absent(missing, rank_names(), start_timeout_s))
        if time.monotonic() > look_at:
            look_at = time.monotonic() + LOOK_S
            if lost := lost_hosts():
                raise TransportError(f"{', '.join(lost)} ended before all ranks had started; see what was said there")
        time.sleep(PERIOD_S)
    store.set_timeout(timeout)
    return store


def _still_missing(store: TCPStore, ranks: Sequence[int]) -> list[int]:
    try:
        return [rank for rank in ranks if not store.check([f"start/{rank}"])]
    except RuntimeError:  # PyTorch's errors of a connection that ends
        raise TransportError("rank 0 ended before all ranks had started; see what was said there") from None


def absent(missing: Sequence[int], names: Sequence[str], start_timeout_s: float) -> str:
    """What to say of ranks that did not come. ``names``: the host of every rank, where the launcher tells."""
    return (
        f"{named_ranks(missing, names)} did not start within {start_timeout_s:g} s of the others; see what was said "
        f"there, or allow more by start_timeout_s"
    )


def _serve(point: MeetingPoint, size: int) -> TCPStore:
    with listening(point.address, point.port) as listener:
        port = listener.getsockname()[1]
        return TCPStore(
            point.address, port, size, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )


def _reach(point: MeetingPoint, size: int, start_timeout_s: float) -> TCPStore:
    deadline = time.monotonic() + start_timeout_s
    # PyTorch's own attempts each write a warning, and their error says nothing about who is missing.
    while not _answers(point, deadline):
        if time.monotonic() > deadline:
            why = absent([0], rank_names(), start_timeout_s)
            raise TransportError(f"{why} (no answer from {point.address}:{point.port})")
        time.sleep(PERIOD_S)
    return TCPStore(point.address, point.port, size, is_master=False, wait_for_workers=False)


def _answers(point: MeetingPoint, deadline: float) -> bool:
    try:
        socket.create_connection((point.address, point.port), max(PERIOD_S, deadline - time.monotonic())).close()
    except OSError:
        return False
    return True
