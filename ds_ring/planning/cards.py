"""What planning knows of a GPU and its links: rates that were measured, and those that are assumed."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ds_ring.planning.rates import Rates
from ds_ring.process.network import ranks_of_host

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Card:
    """What planning needs to know of one rank's device and its links.

    Attributes:
        product_flops: FLOP/s of a large half-precision matrix product, sustained, as whole steps show it.
        memory_gib: its memory.
        link_bytes: bytes/s one way between two of a host, by copy engine.
        memory_bytes: bytes/s of its memory, as a decoding kernel reads it.
        network_bytes: bytes/s one way between hosts, of one device's adapter.
        collective_s: seconds of a small collective inside a host.
        host_bytes: bytes/s from pinned memory of the host, all devices at once. Assumed.
        per_host: how many a host has.
        adapters: how many of its host's adapters there are for each device; less than 1 where devices share them.
        rates: shares and times that depend on the kind of device little.
        assumed: which of the above no record has.
    """

    product_flops: float
    memory_gib: float
    link_bytes: float
    memory_bytes: float
    network_bytes: float = 50e9
    collective_s: float = 20e-6
    host_bytes: float = 50e9
    per_host: int = 8
    adapters: float = 1.0
    rates: Rates = field(default_factory=Rates)
    assumed: str = ""


CARDS = {
    "H100": Card(product_flops=667e12, memory_gib=79, link_bytes=353e9, memory_bytes=3.0e12),
    "H200": Card(673e12, 139, 353e9, 4.0e12, assumed="H200: memory at its datasheet's share that an H100 reaches"),
    "A100": Card(
        250e12, 79, 230e9, 1.7e12, host_bytes=20e9,
        assumed="A100: shares of its datasheet, with an H100's shares and times",
    ),
    "CPU": Card(
        5e10, 16, 2e9, 1e10, per_host=64, collective_s=1e-3, host_bytes=2e9,
        assumed="CPU: only the order of layouts means anything",
        rates=Rates(
            awake=0, beside_copies=0, beside_nccl=1, waiting=1, highest_clock=1,
            message_s=1e-3, all_reduce_start_s=1e-3,
        ),
    ),
}  # fmt: skip
"""Products of H100 and H200: fitted (``rates.py``). Links: transfers_gpu2.json, nbytes over transfer_ms of keys and
values. The network is assumed to be a 400 Gbit/s adapter a GPU. Memory: H100 by decode_h100.json, the others by the
same share of their datasheets; a small collective is assumed."""


def card_of(device: torch.device) -> Card:
    """The planning card of ``device``, on hosts of as many ranks as the launcher put on this one: by its name; an
    unknown GPU is taken for an A100, with its own memory.

    A CPU's memory is shared by the ranks of this host."""
    here = ranks_of_host()
    if device.type != "cuda":
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / max(1, here)
        return replace(CARDS["CPU"], memory_gib=memory / 2**30, per_host=here or CARDS["CPU"].per_host)
    import torch  # here: `plan --help` needs the names of cards only

    name = torch.cuda.get_device_name(device)
    known = next((card for key, card in CARDS.items() if key in name), CARDS["A100"])
    memory = torch.cuda.get_device_properties(device).total_memory
    return replace(known, memory_gib=memory / 2**30, per_host=here or known.per_host)
