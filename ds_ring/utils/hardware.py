"""What the ranks run on: names, peaks and memory."""

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
"""Dense fp16/bf16 tensor-core peaks of the SXM parts, by the vendor's datasheets."""


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


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``, ready for what is queued there next.

    A copy from pageable memory would make the host wait until all that is queued before it is done, at every
    micro-batch, and leave the GPU idle while the next is being prepared.
    """
    if device.type == "cuda" and tensor.device.type == "cpu" and tensor.numel():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
