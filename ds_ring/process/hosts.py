"""Which host every rank of this launch is on, from the command line of DeepSpeed's ``launch.py``, which Linux shows."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence

from ds_ring.process.processes import command_of


def rank_names() -> list[str]:
    """The host of every rank, in rank order; empty on one host, and under other launchers."""
    hosts = world_of(command_of(os.getppid()))
    return [name for name, slots in hosts.items() for _ in slots] if len(hosts) > 1 else []


def world_of(command: Sequence[str]) -> dict[str, list[int]]:
    """The slots of each host in a command of ``launch.py``; empty for any other."""
    for word in command:
        if word.startswith("--world_info="):
            found: dict[str, list[int]] = json.loads(base64.urlsafe_b64decode(word.partition("=")[2]))
            return found
    return {}


def named_ranks(ranks: Sequence[int], names: Sequence[str]) -> str:
    """Ranks by number, with their hosts where ``names`` has them: "ranks 2 and 3 of host2"."""
    if not names:
        return _listed(ranks)
    by_host: dict[str, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(names[rank], []).append(rank)
    return "; ".join(f"{_listed(those)} of {host}" for host, those in by_host.items())


def _listed(ranks: Sequence[int]) -> str:
    *first, last = map(str, ranks)
    return f"ranks {', '.join(first)} and {last}" if first else f"rank {last}"
