"""Out of memory, explained: what was predicted, what was held, and what to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import torch

from ds_ring.config import RunConfig
from ds_ring.engine.model_runner import ModelRunner
from ds_ring.errors import is_out_of_memory
from ds_ring.hf.flops import matrix_elements
from ds_ring.planning.memory_estimate import cache_bytes, peak_bytes
from ds_ring.utils.device import memory_gib, peak_memory_gib

Method = TypeVar("Method", bound=Callable[..., Any])
GIB = 2**30


@contextmanager
def with_memory_note(note: Callable[[], str]) -> Iterator[None]:
    """Where memory runs out inside the block, the error gets ``note()`` (``BaseException.add_note``). Of nested blocks
    the innermost, which knows most, adds its note."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) and not getattr(error, "__notes__", None):
            error.add_note(note())
        raise


def explain_oom(method: Method) -> Method:
    """An engine's method whose error says what its forward was predicted to take."""

    @wraps(method)
    def call(engine: Any, *args: Any, **options: Any) -> Any:
        with with_memory_note(lambda: forward_note(engine.runner)):
            return method(engine, *args, **options)

    return cast(Method, call)


def forward_note(runner: ModelRunner) -> str:
    """One line, about the configuration's own batch and length."""
    work, micro = runner.run_config.workload, runner.run_config.largest_micro_batch
    predicted = _forward_bytes(runner, runner.run_config, micro) / GIB
    return (
        f"{_held(runner.peak_memory_gib, runner.device)}, {predicted:.1f} are predicted for "
        f"micro-batches of {micro} x {work.max_length} tokens; lower micro_batch_size or max_length, or share each "
        f"sequence among more ranks (ring_degree, ulysses_degree)"
    )


def generation_note(runner: ModelRunner, sequences: int, prompt: int, length: int, prefill_chunk: int) -> str:
    """One line about a replica's ``sequences``; the longest has ``prompt`` tokens to run, and ``length`` at the end."""
    work, t = runner.run_config.workload, runner.mesh.topology
    micro, chunk = min(work.micro_batch_size, sequences), min(prefill_chunk or prompt, prompt)
    # Chunks run one after the other: each needs what earlier ones leave.
    run = RunConfig.load(runner.run_config, max_length=chunk, interleave="off")
    cache = cache_bytes(run, runner.dims, sequences, length)
    predicted = (_forward_bytes(runner, run, micro) + cache) / GIB
    return (
        f"{_held(runner.peak_memory_gib, runner.device)}, {predicted:.1f} are predicted: {cache / GIB:.1f} for a cache "
        f"of {sequences} x {length} tokens, the rest for weights and chunks of {micro} x {chunk}; "
        f"{'lower' if prefill_chunk else 'set'} prefill_chunk, give fewer rows or tokens at a time, or share them "
        f"among more ranks ({'tp_size, pp_size' if t.tp * t.pp > 1 else 'ring_degree, ulysses_degree'})"
    )


def weights_note(weight_bytes: int, run: RunConfig, device: torch.device) -> str:
    """One line, about weights that this rank loads or moves."""
    narrower = "take dtype fp16 or bf16, or " if run.dtype == "fp32" else ""
    return (
        f"{_held(peak_memory_gib(device), device)}, {weight_bytes / GIB:.1f} are predicted for this rank's weights in "
        f"{run.dtype}; {narrower}raise pp_size, with more GPUs: a stage loads its own layers alone, which tp_size "
        f"shares only once they are loaded"
    )


def _forward_bytes(runner: ModelRunner, run: RunConfig, micro: int) -> float:
    own, t = sum(map(matrix_elements, runner.decoder.layers)), runner.mesh.topology
    return peak_bytes(run, runner.dims, own * t.tp * t.pp, micro)


def _held(gib: float, device: torch.device) -> str:
    whole = memory_gib(device)
    return f"{gib:.1f} GiB were held" + (f" of {whole:.1f}" if whole else "")
