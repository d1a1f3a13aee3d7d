"""What the ranks run on: names, peaks and memory."""

from __future__ import annotations

import gc
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

DATASHEET_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense fp16/bf16 tensor-core peaks of the SXM parts, by the vendor's datasheets."""


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
    """The planning card of ``device``: by its name; an unknown GPU is taken for an A100, with its own memory."""
    if device.type != "cuda":
        return CARDS["CPU"]
    name = torch.cuda.get_device_name(device)
    known = next((card for key, card in CARDS.items() if key in name), CARDS["A100"])
    return replace(known, memory_gib=torch.cuda.get_device_properties(device).total_memory / 2**30)


def synchronize(device: torch.device) -> None:
    """Wait until everything queued on ``device`` has run."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s) a rank"


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """(FLOP/s of one rank, where the figure is from): the datasheet's, or a matrix product timed here and now."""
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        for name, flops in DATASHEET_FLOPS.items():
            if name in torch.cuda.get_device_name(device):
                return flops, f"datasheet {name} {flops / 1e12:.0f} TFLOP/s"
    n = 4096 if device.type == "cuda" else 768
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    rate = 2 * n**3 / _fastest_s(device, lambda: torch.mm(a, b))
    return rate, f"best of 5 products of {n} x {n} {dtype} matrices on every rank at once"


def copy_rate(device: torch.device) -> float:
    """Bytes/s, those read and those written, of the fastest of five copies of a large tensor."""
    tensor = torch.zeros(1 << 30 if device.type == "cuda" else 1 << 24, dtype=torch.uint8, device=device)
    out = torch.empty_like(tensor)
    return 2 * tensor.nbytes / _fastest_s(device, lambda: out.copy_(tensor))


def _fastest_s(device: torch.device, call: Callable[[], object]) -> float:
    """Seconds of the fastest of five calls."""
    best = float("inf")
    for _ in range(5):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def peak_memory_gib(device: torch.device) -> float:
    """The most this rank has held: of GPU memory, or of resident host memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory_gib(device: torch.device, limit_gib: float | None = None) -> float | None:
    """What this rank may hold of GPU memory; None on a CPU, where others share it."""
    if device.type != "cuda":
        return None
    whole = torch.cuda.get_device_properties(device).total_memory / 2**30
    return whole if limit_gib is None else min(whole, limit_gib)


def limit_memory(device: torch.device, gib: float) -> None:
    """From now on PyTorch's allocator refuses what exceeds ``gib`` of GPU memory; on a CPU, where a process holds much
    that is no tensor, what exceeds what the process holds now by more than that. Linux only."""
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib / whole), device.index)
        return
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (pages * resource.getpagesize() + int(gib * 2**30), hard))


def release_memory() -> None:
    """Give back what engines held that are gone: their tensors refer to each other in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def held_memory_gib(device: torch.device) -> float:
    """What this rank holds now: of GPU memory in tensors, or of resident host memory (Linux)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**30
