"""Whether ``torch.compile`` of each decoder layer does as well as our fusion of layers (ds_ring/fusion), on one GPU.

Variants of one model share its weights and take turns: transformers' layers as they are, our fusion, and transformers'
layers compiled one by one (compiled_layers.py). All run in an engine of one rank and attend by ds_ring. The lengths of
a case follow one another, which shows what a new length makes Dynamo compile again.

Two GPUs are not measured. In a ring of two our fusion first projects and rotates keys and values, straight into memory
that the other rank reads, and they travel while queries are projected (ds_ring/fusion/kv_first.py). A compiled layer
cannot do that: Inductor decides the order of kernels and the memory of their results, and attention gets queries, keys
and values together, when all are there. Their transfer then starts later, after one more copy. A compiled layer does
not run its MLP in tiles of tokens either (ds_ring/fusion/tiling.py), which the longest sequences need.
"""

# Shapes: B batch, L tokens, d hidden size.
from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

import ds_ring
from benchmarks.kernels.attention_timing import Timed, stopwatch, sustain
from benchmarks.kernels.compiled_layers import Compilations, compile_layers, forget
from benchmarks.layouts.gpu_telemetry import watched_gpu
from ds_ring.engine.batch import Batch, pack
from ds_ring.engine.engine import Engine
from ds_ring.hf.build import build
from ds_ring.hf.dims import model_dims
from ds_ring.utils.device import release_memory, synchronize
from ds_ring.utils.model_config import read_config

STOCK, FUSED, COMPILED = "transformers' layers", "ds_ring's fusion", "torch.compile"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """One pass of ``batch`` x ``length`` tokens, in one micro-batch; ``model``: config file or checkpoint directory."""

    model: str
    batch: int
    length: int

    @property
    def lengths(self) -> list[int]:
        return [self.length, 3 * self.length // 4, self.length // 2]


@dataclass(frozen=True)
class Effort:
    """``seconds`` for each variant at a case's own length, in ``rounds`` turns; at other lengths less."""

    seconds: float
    rounds: int
    backend: str


@dataclass
class _Variant:
    """One way of running the layers. ``mode``: of ``torch.compile``; ``error``: what ended it."""

    name: str
    mode: str | None = None
    engine: Engine | None = None
    error: str | None = None

    def build(self, model: PreTrainedModel, case: Case, backend: str) -> None:
        """An engine around the parameters of ``model`` themselves; all else of it is copied."""
        own = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        sizes = {"batch_size": case.batch, "micro_batch_size": case.batch, "max_length": case.length}
        engine = ds_ring.init_inference(own, fusion="auto" if self.name == FUSED else "none", **sizes)
        if self.mode is not None:
            compile_layers(engine, self.mode, backend)
        self.engine = engine

    def run(self, batch: Batch) -> Tensor:
        """One pass: final hidden states [B, L, d]."""
        assert self.engine is not None
        (shard,) = self.engine.prefill(batch, "last", want_hidden=True)
        assert shard.hidden_BTd is not None
        return shard.hidden_BTd

    def attempt(self, work: Callable[[], object]) -> None:
        """``work``, unless an earlier one failed: a failure ends this variant, not the benchmark."""
        try:
            if self.error is None:
                work()
        except Exception as error:  # compilers fail in many ways
            self.error, self.engine = f"{type(error).__name__}: {error}"[:2000], None


def run(
    cases: Sequence[Case], modes: Sequence[str], dtype: torch.dtype, device: torch.device, effort: Effort, say: Say
) -> Iterator[dict[str, Any]]:
    """A row of each case, length and variant; each of ``modes``, of ``torch.compile``, is a variant."""
    for case in cases:
        yield from _case(case, modes, dtype, device, effort, say)
        forget()
        release_memory()


def random_model(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Made on ``device``, with biases and norms that do something."""
    with torch.device(device), torch.no_grad():
        model: PreTrainedModel = build(config, dtype)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _case(
    case: Case, modes: Sequence[str], dtype: torch.dtype, device: torch.device, effort: Effort, say: Say
) -> Iterator[dict[str, Any]]:
    name, config = Path(case.model).stem, read_config(case.model)
    model, shape = random_model(config, dtype, device), model_dims(config)
    variants = [_Variant(STOCK), _Variant(FUSED), *(_Variant(f"{COMPILED}, {mode}", mode) for mode in modes)]
    for variant in variants:
        variant.attempt(partial(variant.build, model, case, effort.backend))
    for length in case.lengths:
        own, want, tokens = length == case.length, list[Tensor](), case.batch * length
        batch, _ = pack(torch.randint(shape.vocab_size, (case.batch, length)), None, None, shape)
        # A first call builds and tests attention's kernels, which is no compilation of layers.
        variants[0].attempt(partial(variants[0].run, batch))
        rows = [{"case": name, "batch": case.batch, "length": length, "variant": v.name} for v in variants]
        for variant, row in zip(variants, rows, strict=True):
            say(f"{name}, {case.batch} x {length:,}: first pass of {variant.name}")
            variant.attempt(partial(_first_passes, variant, batch, want, own, device, row))
        timed = [Timed(partial(variant.run, batch), 1) for variant in variants]
        say(f"{name}, {case.batch} x {length:,}: take turns")
        _take_turns(variants, timed, device, effort.seconds / (1 if own else 4), effort.rounds if own else 2)
        fused_s = None if variants[1].error else timed[1].seconds
        for variant, row, one in zip(variants, rows, timed, strict=True):
            yield {**row, **({"error": variant.error} if variant.error else _figures(one, tokens, fused_s))}


def _first_passes(
    variant: _Variant, batch: Batch, want: list[Tensor], first: bool, device: torch.device, row: dict[str, Any]
) -> None:
    """Enter into ``row`` what the first pass at a length compiles, how much longer it takes than a second, and what
    that one holds. The first variant puts its hidden states into ``want``; those of others are compared with them."""
    assert variant.engine is not None
    compilations = Compilations(variant.engine.runner.decoder.layers[0])
    first_s, hidden_BLd = _timed(variant, batch, device)
    row |= compilations.figures(first)
    if variant.name == STOCK:
        want.append(hidden_BLd.cpu())
    row["rel_error"] = _error(hidden_BLd, want[0].to(device, torch.float32)) if want else None
    del hidden_BLd
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    second_s, _ = _timed(variant, batch, device)
    row |= {"compile_s": first_s - second_s, "peak_memory_gib": variant.engine.runner.peak_memory_gib}
    row["fused"] = str(variant.engine.runner.fusion or "")


def _timed(variant: _Variant, batch: Batch, device: torch.device) -> tuple[float, Tensor]:
    synchronize(device)
    started = time.perf_counter()
    hidden_BLd = variant.run(batch)
    synchronize(device)
    return time.perf_counter() - started, hidden_BLd


def _error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def _take_turns(
    variants: Sequence[_Variant], timed: Sequence[Timed], device: torch.device, seconds: float, rounds: int
) -> None:
    """Time each variant, on a warm GPU. Every other round is in reverse order: none always follows the same one."""
    watch, pairs = stopwatch(device), list(zip(variants, timed, strict=True))

    def turn(one: Timed) -> None:
        with watched_gpu(device) as gpu:
            one.chunks += sustain(one.call, 1, seconds / rounds, watch)
        one.gpu.append(gpu)

    variants[0].attempt(partial(sustain, timed[0].call, 1, seconds / 2, watch))
    for number in range(rounds):
        for variant, one in pairs[:: -1 if number % 2 else 1]:
            variant.attempt(partial(turn, one))


def _figures(timed: Timed, tokens: int, fused_s: float | None) -> dict[str, Any]:
    return {
        "tps": tokens / timed.seconds, "ms": 1e3 * timed.seconds, "passes": len(timed.chunks),
        "spread": (max(timed.chunks) - min(timed.chunks)) / timed.seconds, "sustained_s": timed.sustained,
        "over_fusion": None if fused_s is None else fused_s / timed.seconds,
        "energy_j": sum(gpu.get("energy_j", 0) for gpu in timed.gpu) / len(timed.chunks) or None,
        **{name: timed.sensor(name) for name in ("sm_clock_mhz", "power_w", "temperature_c")},
    }  # fmt: skip
