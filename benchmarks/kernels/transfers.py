"""What transfers between GPUs cost a layer's matrix products beside them, where the power limit sets the clock.

Copy engines need no SM, and yet products get slower: moving bytes and keeping links awake takes power that the SMs then
lack. Every GPU runs the products of a layer over and over and pulls from the next one meanwhile, in one of several
``Traffic``s; all are measured there and back, after the GPUs have become warm.
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
"""Layers whose work is queued ahead of the host."""


@dataclass(frozen=True)
class Traffic:
    """What a GPU pulls for each layer: rows of ``row_nbytes``, one beside the other's end, as keys and values lie in a
    fused projection. ``every`` so many layers it pulls so many times as much, one after the other."""

    name: str
    nbytes: int
    row_nbytes: int
    every: int = 1

    def part(self, memory: Tensor) -> Tensor:
        """The rows within a buffer of at least ``2 * nbytes``."""
        rows = self.nbytes // self.row_nbytes
        return memory[: 2 * self.nbytes].view(rows, 2, self.row_nbytes)[:, 0]


def traffics(token_nbytes: int, rows: int) -> list[Traffic]:
    """``token_nbytes``: of a token's keys and values in one layer; ``rows``: tokens."""
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
    """One GPU's products and what it pulls from."""

    def __init__(self, device: torch.device, chosen: Sequence[Case], rows: int, dtype: torch.dtype, room: int) -> None:
        self.device = device
        with torch.cuda.device(device):
            self._tensors = [tensors(case, rows, dtype, device) for case in chosen]
            self._products = [as_pytorch(case, *t) for case, t in zip(chosen, self._tensors, strict=True)]
            self.memory = torch.zeros(room, dtype=torch.uint8, device=device)
            self._inbox = torch.zeros(room, dtype=torch.uint8, device=device)
            self._queue = CudaQueue(torch.cuda.Stream(device, priority=-1))
        self._layers = 0

    def layer(self, traffic: Traffic, peer: _Gpu) -> tuple[torch.cuda.Event, ...]:
        """Queue the products of a layer and, beside them, a pull from ``peer``. Events: of the products' end, of the
        pull's beginning and end."""
        with torch.cuda.device(self.device):
            begun, pulled, done = (torch.cuda.Event(enable_timing=True) for _ in range(3))
            self._queue.stream.wait_stream(torch.cuda.current_stream())
            begun.record(self._queue.stream)
            self._layers += 1
            if traffic.nbytes and self._layers % traffic.every == 0:
                for _ in range(traffic.every):
                    self._queue.copy(traffic.part(self._inbox), traffic.part(peer.memory))
            pulled.record(self._queue.stream)
            for product in self._products:
                product()
            done.record()
        return done, begun, pulled

    def open(self, peer: _Gpu) -> None:
        """Map ``peer``'s memory: PyTorch does at a first copy."""
        self._inbox.copy_(peer.memory)


def run(
    dims: ModelDims, rows: int, dtype: torch.dtype, devices: Sequence[torch.device], seconds: float, warm_s: float,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A row of each second of ``warm_s`` without transfers, and then of each traffic, twice: there and back.

    Args:
        seconds: how long each is sustained.
    """
    chosen = [case for case in cases(dims) if case.name != "attention's result"]
    several = traffics(2 * dims.num_kv_heads * dims.head_dim * dtype.itemsize, rows)
    room = 2 * max(t.nbytes for t in several)
    gpus = [_Gpu(device, chosen, rows, dtype, room) for device in devices]
    for gpu, peer in zip(gpus, gpus[1:] + gpus[:1], strict=True):
        gpu.open(peer)
    begun = time.perf_counter()
    for second in range(1, round(warm_s) + 1):
        yield {"phase": "warming", "second": second, **_sustained(gpus, NOTHING, 1.0)}
    say(f"warm after {time.perf_counter() - begun:.0f} s")
    for phase, order in (("there", several), ("back", several[::-1])):
        for traffic in order:
            say(f"{phase}: {traffic.name}")
            yield {"phase": phase, **_sustained(gpus, traffic, seconds)}


def _sustained(gpus: Sequence[_Gpu], traffic: Traffic, seconds: float) -> dict[str, Any]:
    """Means over GPUs, of one layer."""
    with ExitStack() as stack:
        watched = [stack.enter_context(watched_gpu(gpu.device)) for gpu in gpus]
        layers, pulls = 0, list[float]()
        queued: list[list[tuple[torch.cuda.Event, ...]]] = []
        begun = time.perf_counter()
        while time.perf_counter() - begun < seconds or queued:
            if time.perf_counter() - begun < seconds:
                queued.append([gpu.layer(traffic, peer) for gpu, peer in zip(gpus, [*gpus[1:], gpus[0]], strict=True)])
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
