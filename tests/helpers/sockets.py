"""The TCP sockets of processes, as Linux shows them."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path

LISTENING = "0A"


@dataclass(frozen=True)
class Socket:
    """``address`` is the local one; ``peer`` is unspecified where the socket listens."""

    address: str
    port: int
    peer: str
    listens: bool

    @property
    def stays_here(self) -> bool:
        ends = [self.address] if self.listens else [self.address, self.peer]
        return all(ipaddress.ip_address(end).is_loopback for end in ends)


def sockets_of(pid: int) -> list[Socket]:
    """The TCP sockets that process ``pid``, of this network namespace, has open."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(descriptor))
        except FileNotFoundError:  # closed meanwhile
            continue
        if found:
            inodes.add(found[1])
    return [
        Socket(_address(words[1]), int(words[1].partition(":")[2], 16), _address(words[2]), words[3] == LISTENING)
        for table in ("tcp", "tcp6")
        for words in map(str.split, Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:])
        if words[9] in inodes
    ]


def _address(text: str) -> str:
    """The address of ``/proc/net/tcp``: words of 32 bits in the machine's order, then a port."""
    digits = text.partition(":")[0]
    data = b"".join(bytes.fromhex(digits[i : i + 8])[::-1] for i in range(0, len(digits), 8))
    address = ipaddress.ip_address(data)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)
