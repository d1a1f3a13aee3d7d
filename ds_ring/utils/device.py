"""Devices: names, peak rates, memory, and copies to them."""

from __future__ import annotations

import gc
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

DATASHEET_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense fp16/bf16 tensor-core FLOP/s of the SXM cards, from the vendor's datasheets."""


def synchronize(device: torch.device) -> None:
    """Wait until everything queued on ``device`` has run."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s) a rank"


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """(FLOP/s of one rank, source of the figure): the datasheet, or else a matrix product that is timed now."""
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        for name, flops in DATASHEET_FLOPS.items():
            if name in torch.cuda.get_device_name(device):
                return flops, f"datasheet {name} {flops / 1e12:.0f} TFLOP/s"
    n = 4096 if device.type == "cuda" else 768
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    rate = 2 * n**3 / _fastest_s(device, lambda: torch.mm(a, b))
    return rate, f"best of 5 products of {n} x {n} {dtype} matrices on every rank at once"


def copy_rate(device: torch.device) -> float:
    """Bytes/s, read plus written, of the fastest of five copies of a large tensor."""
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
    """The most that this rank has held: GPU memory in tensors, or resident host memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def held_memory_gib(device: torch.device) -> float:
    """What this rank holds now: GPU memory in tensors, or resident host memory (Linux)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**30


def memory_gib(device: torch.device, limit_gib: float | None = None) -> float | None:
    """The GPU memory that this rank may use, at most ``limit_gib``; None on a CPU, whose memory others share."""
    if device.type != "cuda":
        return None
    whole = torch.cuda.get_device_properties(device).total_memory / 2**30
    return whole if limit_gib is None else min(whole, limit_gib)


def limit_memory(device: torch.device, gib: float) -> None:
    """From now on allocations fail when this rank would use more than ``gib`` of GPU memory.

    On a CPU they fail when the process would use ``gib`` more than it uses now, because a process holds much that is no
    tensor. Linux only.
    """
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib / whole), device.index)
        return
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (pages * resource.getpagesize() + int(gib * 2**30), hard))


def release_memory() -> None:
    """Free the memory of engines that are no longer used. Their tensors are in reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``, ready for work that is queued there after this call.

    A copy from pageable memory would make the host wait for all work queued before it. At every micro-batch the GPU
    would then be idle while the host prepares the next one.
    """
    if device.type == "cuda" and tensor.device.type == "cpu" and tensor.numel():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
