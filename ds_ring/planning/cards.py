"""What planning knows of a GPU and its links: rates that were measured, and those that are assumed."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Card:
    """What planning needs to know of one rank's device and its links.

    Attributes:
        product_flops: FLOP/s of a large half-precision matrix product, sustained.
        memory_gib: its memory.
        link_bytes: bytes/s one way between two of a host.
        memory_bytes: bytes/s of its memory, as a decoding kernel reads it.
        network_bytes: bytes/s one way a device between hosts.
        collective_s: seconds of a small collective inside a host.
        per_host: how many a host has.
    """

    product_flops: float
    memory_gib: float
    link_bytes: float
    memory_bytes: float
    network_bytes: float = 50e9
    collective_s: float = 20e-6
    per_host: int = 8


CARDS = {
    "H100": Card(product_flops=660e12, memory_gib=79, link_bytes=340e9, memory_bytes=3.0e12),
    "H200": Card(product_flops=660e12, memory_gib=139, link_bytes=340e9, memory_bytes=4.0e12),
    "A100": Card(product_flops=250e12, memory_gib=79, link_bytes=230e9, memory_bytes=1.7e12),
    "CPU": Card(5e10, memory_gib=16, link_bytes=2e9, memory_bytes=1e10, per_host=64, collective_s=1e-3),
}
"""H100 and H200: products as sustained under a 700 W cap (benchmarks/results/); links as seen once through NCCL on an
NVSwitch, without a results file; the network is assumed to be a 400 Gbit/s adapter a GPU. Memory: H100 by
decode_h100.json, the others by the same share of their datasheets; a small collective is assumed. A100: shares of its
datasheet, not measured. CPU: only the order of layouts means anything."""


def card_of(device: torch.device) -> Card:
    """The planning card of ``device``: by its name; an unknown GPU is taken for an A100, with its own memory.

    A CPU's memory is shared by the ranks of this host."""
    if device.type != "cuda":
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return replace(CARDS["CPU"], memory_gib=memory / 2**30)
    import torch  # here: `plan --help` needs the names of cards only

    name = torch.cuda.get_device_name(device)
    known = next((card for key, card in CARDS.items() if key in name), CARDS["A100"])
    return replace(known, memory_gib=torch.cuda.get_device_properties(device).total_memory / 2**30)
