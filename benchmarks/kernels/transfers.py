"""How much transfers between GPUs slow down a layer's matrix products, where the power limit sets the clock.

Copy engines use no SM, and still products become slower: moving bytes and keeping links awake takes power that the SMs
then lack. Every GPU runs the products of a layer again and again, and meanwhile copies from the next GPU. Each kind of
``Traffic`` is measured twice, in order and in reverse order, after the GPUs have become warm.
"""

# Shapes: M rows, N columns in, W columns out.
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.products import Case, as_pytorch, cases, tensors
from benchmarks.layouts.gpu_telemetry import watched_gpu
from ds_ring.model_dims import ModelDims
from ds_ring.transport.cuda_memory import CudaQueue
from ds_ring.utils.device import synchronize

IN_FLIGHT = 2
"""Layers that are queued before the host waits for the first of them."""


@dataclass(frozen=True)
class Traffic:
    """What a GPU copies from the next one for each layer.

    Attributes:
        nbytes: bytes a layer.
        row_nbytes: bytes of a contiguous row. Between two rows there is a gap of the same size, as between the keys and
            values of tokens in a fused projection.
        every: number of layers whose copies are made together.
    """

    name: str
    nbytes: int
    row_nbytes: int
    every: int = 1

    def part(self, memory: Tensor) -> Tensor:
        """The rows in ``memory``, a buffer of at least ``2 * nbytes``."""
        rows = self.nbytes // self.row_nbytes
        return memory[: 2 * self.nbytes].view(rows, 2, self.row_nbytes)[:, 0]


def traffics(token_nbytes: int, rows: int) -> list[Traffic]:
    """``token_nbytes``: bytes of a token's keys and values in one layer; ``rows``: tokens."""
    once = token_nbytes * rows
    return [
        NOTHING,
        Traffic("64 bytes", 64, 32),
        Traffic("keys and values", once, token_nbytes),
        Traffic("4 times keys and values", 4 * once, token_nbytes),
        Traffic("an eighth of keys and values, in rows of 32 bytes", once // 8, 32),
        Traffic("keys and values of 4 layers, every 4 layers", once, token_nbytes, every=4),
        Traffic("keys and values of 16 layers, every 16 layers", once, token_nbytes, every=16),
    ]


NOTHING = Traffic("nothing", 0, 1)


class _Gpu:
    """One GPU with its products and a buffer from which others copy."""

    def __init__(
        self, device: torch.device, products: Sequence[Case], rows: int, dtype: torch.dtype, nbytes: int
    ) -> None:
        self.device = device
        with torch.cuda.device(device):
            self._tensors = [tensors(case, rows, dtype, device) for case in products]
            self._products = [as_pytorch(case, *t) for case, t in zip(products, self._tensors, strict=True)]
            self.memory = torch.zeros(nbytes, dtype=torch.uint8, device=device)
            self._inbox = torch.zeros(nbytes, dtype=torch.uint8, device=device)
            self._queue = CudaQueue(torch.cuda.Stream(device, priority=-1))
        self._layers = 0

    def layer(self, traffic: Traffic, source: _Gpu) -> tuple[torch.cuda.Event, ...]:
        """Queue the products of a layer and, on another stream, a copy from ``source``.

        Returns (end of the products, beginning of the copy, end of the copy)."""
        with torch.cuda.device(self.device):
            begun, pulled, done = (torch.cuda.Event(enable_timing=True) for _ in range(3))
            self._queue.stream.wait_stream(torch.cuda.current_stream())
            begun.record(self._queue.stream)
            self._layers += 1
            if traffic.nbytes and self._layers % traffic.every == 0:
                for _ in range(traffic.every):
                    self._queue.copy(traffic.part(self._inbox), traffic.part(source.memory))
            pulled.record(self._queue.stream)
            for product in self._products:
                product()
            done.record()
        return done, begun, pulled

    def open(self, source: _Gpu) -> None:
        """Map the memory of ``source``: PyTorch does so at the first copy."""
        self._inbox.copy_(source.memory)


def run(
    dims: ModelDims, rows: int, dtype: torch.dtype, devices: Sequence[torch.device], seconds: float, warm_s: float,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Rows of each second of ``warm_s`` without transfers, and then of each traffic, in order and in reverse order.

    Args:
        seconds: how long each traffic is sustained.
    """
    products = [case for case in cases(dims) if case.name != "attention's result"]
    several = traffics(2 * dims.num_kv_heads * dims.head_dim * dtype.itemsize, rows)
    nbytes = 2 * max(t.nbytes for t in several)
    gpus = [_Gpu(device, products, rows, dtype, nbytes) for device in devices]
    for gpu, source in zip(gpus, gpus[1:] + gpus[:1], strict=True):
        gpu.open(source)
    begun = time.perf_counter()
    for second in range(1, round(warm_s) + 1):
        yield {"phase": "warming", "second": second, **_sustained(gpus, NOTHING, 1.0)}
    say(f"warm after {time.perf_counter() - begun:.0f} s")
    for phase, order in (("there", several), ("back", several[::-1])):
        for traffic in order:
            say(f"{phase}: {traffic.name}")
            yield {"phase": phase, **_sustained(gpus, traffic, seconds)}


def _sustained(gpus: Sequence[_Gpu], traffic: Traffic, seconds: float) -> dict[str, Any]:
    """Means over GPUs, for one layer."""
    with ExitStack() as stack:
        watched = [stack.enter_context(watched_gpu(gpu.device)) for gpu in gpus]
        layers, pulls = 0, list[float]()
        queued: list[list[tuple[torch.cuda.Event, ...]]] = []
        begun = time.perf_counter()
        while time.perf_counter() - begun < seconds or queued:
            if time.perf_counter() - begun < seconds:
                sources = [*gpus[1:], gpus[0]]
                queued.append([gpu.layer(traffic, source) for gpu, source in zip(gpus, sources, strict=True)])
                layers += 1
                if len(queued) <= IN_FLIGHT:
                    continue
            for done, start, end in queued.pop(0):
                done.synchronize()
                end.synchronize()
                pulls.append(start.elapsed_time(end))
        for gpu in gpus:
            synchronize(gpu.device)
        taken = time.perf_counter() - begun
    names = [name for name in watched[0] if all(name in found for found in watched)]
    figures = {name: statistics.mean(found[name] for found in watched) for name in names}
    if "energy_j" in figures:
        figures["energy_j"] /= layers
    return {
        "traffic": traffic.name, "nbytes": traffic.nbytes, "layers": layers, "layer_ms": 1e3 * taken / layers,
        "transfer_ms": statistics.mean(pulls) if traffic.nbytes else 0.0, **figures,
    }  # fmt: skip
