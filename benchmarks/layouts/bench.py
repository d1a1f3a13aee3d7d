"""Measures one layout on one workload: throughput, latency, memory, and the cost of communication.

Per size of micro-batch and length, in this order: parity with the unsharded model (once a length, where a reference is
given), a pass that counts bytes and keeps a journal of what is sent, warm-ups, timed passes and, but for
``speed_only``, the same passes with communication left out and the journal alone. *Exposed* communication is the timed
step less the step without communication (a pipeline's bubble shows up there too); communication *alone* is the journal
run through with nothing else to do.

A large batch consists of equal micro-batches, so passes that are not timed take only its first sequences
(``warmup_batch_size``; by default 16 micro-batches a replica). Counted bytes and the time of communication
alone are scaled by the number of sequences.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.communication.engines import muted
from benchmarks.layouts import parity
from benchmarks.layouts.gpu_telemetry import watched_gpu
from benchmarks.layouts.profile_trace import trace_step
from benchmarks.layouts.timing import Timing, count_bytes, time_passes
from ds_ring.config import Mode, RunConfig
from ds_ring.engine import nan_check
from ds_ring.engine.batch import Batch, pack
from ds_ring.engine.engine import Engine
from ds_ring.engine.model_runner import Shard
from ds_ring.hf.attention import torch_dtype
from ds_ring.hf.dims import model_dims
from ds_ring.hf.flops import layer_parameters
from ds_ring.planning.comm_volume import bytes_sent_per_rank
from ds_ring.planning.metrics import Work
from ds_ring.planning.validation import check_workload
from ds_ring.utils.corpus import text_windows, token_stream
from ds_ring.utils.device import device_name, peak_flops
from ds_ring.utils.model_config import read_config

WARMUP_MICRO_BATCHES = 16

Report = Callable[[str], None]


def check(config: RunConfig) -> None:
    """Refuse a workload that the model cannot run. Loads nothing.

    Raises:
        ConfigError, CheckpointError: no model, more tokens than positions, fewer sequences than replicas.
    """
    check_workload(config, model_dims(read_config(config.checkpoint)))


def measure(
    engine: Engine, references: dict[int, str], report: Report, trace: Path | None = None
) -> Iterator[dict[str, Any]]:
    """A row for each size of micro-batch and length, both ascending, and each mode of the workload. Collective.

    Args:
        references: files of ``parity.write_reference`` by length.
        trace: file for the Chrome trace of one more, untimed pass over the longest, in the smallest micro-batches.
    """
    config, dtype = engine.run_config, torch_dtype(engine.run_config.dtype)
    stream = token_stream(config.checkpoint, config.benchmark.text)
    layers = layer_parameters(read_config(config.checkpoint))
    peak, peak_source = peak_flops(engine.device, dtype)
    peak = statistics.median(engine.gather(peak))
    differences: dict[tuple[int, Mode], parity.Difference | None] = {}
    traced = config.micro_batch_sizes[0], config.lengths[-1], config.benchmark.modes[0]
    for size, length in product(config.micro_batch_sizes, config.lengths):
        engine.runner.run_config = RunConfig.load(config, micro_batch_size=size)
        ids = text_windows(stream, config.workload.batch_size, length)
        batch, _ = pack(ids, None, None, engine.runner.dims)
        with engine.watchdog.watch("agreeing on the batch"):
            engine.mesh["world"].agree(input_ids=batch.digest())
        for mode in config.benchmark.modes:
            last = layers[-1] if mode == "prefill_only" else None
            work = Work(engine.runner.dims, sum(layers), config.workload.batch_size, length, last)
            if (length, mode) not in differences:  # of single sequences: the same for any micro-batch
                differences[length, mode] = _difference(engine, length, mode, references.get(length), report)
            found = _measure_length(engine, batch, mode, report)
            row = _row(engine, work, mode, found, differences[length, mode], peak, peak_source)
            if trace is not None and (size, length, mode) == traced:
                report(f"{config.label}, L = {length}: trace one pass")
                row |= _trace(engine, batch, trace)
            yield row
    if engine.runner.fusion is not None:
        report(str(engine.runner.fusion))


def warmup_sequences(config: RunConfig) -> int:
    """The number of sequences of untimed passes: whole micro-batches of every replica, of every size in the batch.

    What is counted in these passes is scaled up to the batch."""
    work, replicas = config.workload, config.parallel.dp_size
    alike = replicas * work.micro_batch_size
    if work.batch_size % alike:
        return work.batch_size
    wanted = config.benchmark.warmup_batch_size or WARMUP_MICRO_BATCHES * alike
    return min(work.batch_size, -(-wanted // alike) * alike)


def _trace(engine: Engine, batch: Batch, file: Path) -> dict[str, Any]:
    """Figures of ``profile_trace.summary``, means over ranks, and some of each rank, because faster ranks wait."""
    warmup_batch = batch.split(range(warmup_sequences(engine.run_config)))

    def step() -> None:
        engine.prefill(warmup_batch, "last")

    engine.meet()
    own = trace_step(step, engine.device, file, engine.mesh.rank, len(engine.runner.layers))
    everyone = engine.gather(own)
    apart = {
        f"trace_{name}_by_rank": _each(o[name] for o in everyone) for name in ("gemm_ms", "idle_ms") if name in own
    }
    return {"trace": str(file)} | {f"trace_{name}": statistics.mean(o[name] for o in everyone) for name in own} | apart


@dataclass(frozen=True)
class _Measured:
    bytes_sent: float
    peak_memory_gib: float
    step: Timing
    step_without_comm: Timing | None
    comm_alone: Timing | None
    gpu: dict[str, Any]


def _difference(
    engine: Engine, length: int, mode: Mode, reference: str | None, report: Report
) -> parity.Difference | None:
    if reference is None:
        return None
    report(f"{engine.run_config.label}, L = {length}, {mode}: compare with the unsharded model")
    return (parity.compare if mode == "full" else parity.compare_last)(engine, reference)


def _measure_length(engine: Engine, batch: Batch, mode: Mode, report: Report) -> _Measured:
    work, how = engine.run_config.workload, engine.run_config.benchmark
    label = f"{engine.run_config.label}, L = {batch.length}, {mode}"
    if how.micro_batch_sizes:
        label += f", micro-batches of {work.micro_batch_size}"
    warmup_batch = batch.split(range(warmup_sequences(engine.run_config)))
    scale = len(batch.sequences) / len(warmup_batch.sequences)

    last: Sequence[Shard | Tensor | None] = []

    def step(taken: Batch = batch) -> None:
        nonlocal last
        last = engine.prefill(taken, "last") if mode == "full" else engine.prefill_only(taken)

    report(f"{label}: count bytes")
    bytes_sent, journal = count_bytes(engine, lambda: step(warmup_batch))
    nan_check.require(engine.runner, all(map(_finite, last)), lambda: step(warmup_batch))
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)

    report(f"{label}: warm up")
    for _ in range(how.warmup):
        step(warmup_batch)
    sustained = f" and more, for {how.sustain_s} s" if how.sustain_s else ""
    report(f"{label}: {how.repeats} timed passes{sustained}")
    with watched_gpu(engine.device) as gpu:
        timing = time_passes(engine, step, how.repeats, how.sustain_s)
    nan_check.require(engine.runner, all(map(_finite, last)), step)
    # GPUs with equal power limits have unequal clocks, and all wait for the slowest.
    clocks = [clock for clock in engine.gather(gpu.get("sm_clock_mhz")) if clock is not None]
    figures = _of_a_pass(gpu, timing) | ({"sm_clock_mhz_by_rank": _each(clocks)} if clocks else {})
    # Before the passes without communication, which hold memory of their own beside the peer memory.
    peak_memory_gib = max(engine.gather(engine.runner.peak_memory_gib))
    if how.speed_only:
        return _Measured(bytes_sent * scale, peak_memory_gib, timing, None, None, figures)
    report(f"{label}: without communication")
    with muted(engine):
        step(warmup_batch)
        with watched_gpu(engine.device) as muted_gpu:
            without_comm = time_passes(engine, step, how.repeats)
    report(f"{label}: communication alone")

    def replay() -> None:
        for again in journal:
            again()

    replay()
    alone = time_passes(engine, replay, how.repeats)
    figures |= {f"muted_{name}": x for name, x in _of_a_pass(muted_gpu, without_comm).items()}
    alone = Timing([scale * s for s in alone.samples_s])
    return _Measured(bytes_sent * scale, peak_memory_gib, timing, without_comm, alone, figures)


def _finite(result: Shard | Tensor | None) -> bool:
    return nan_check.finite_shard(result) if isinstance(result, Shard) else nan_check.all_finite(result)


def _each(values: Iterable[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)


def _of_a_pass(gpu: dict[str, float], timing: Timing) -> dict[str, float]:
    """The figures of ``watched_gpu``, with the energy of one pass."""
    return gpu | ({"energy_j": gpu["energy_j"] / len(timing.samples_s)} if "energy_j" in gpu else {})


def _row(
    engine: Engine, work: Work, mode: Mode, found: _Measured, difference: parity.Difference | None, peak: float,
    peak_source: str,
) -> dict[str, Any]:  # fmt: skip
    config, topology = engine.run_config, engine.mesh.topology
    step = found.step.median_s
    tps = work.tps(step)
    itemsize = torch_dtype(config.dtype).itemsize
    return {
        "layout": config.label,
        "implementation": config.benchmark.implementation,
        "mode": mode,
        "gpus": topology.world_size,
        **{
            f"{axis}_degree" if axis in ("ring", "ulysses") else f"{axis}_size": n
            for axis, n in asdict(topology).items()
        },
        "ring_impl": config.parallel.ring_impl,
        "ring_variant": config.parallel.ring_variant,
        "transport": engine.mesh.transport_names,
        "in_flight": min(engine.runner.lanes, config.micro_batches(config.workload.micro_batch_size)),
        "batch": work.batch,
        "micro_batch": config.workload.micro_batch_size,
        "warmup_batch": warmup_sequences(config),
        "length": work.length,
        "dtype": config.dtype,
        "fusion": config.ring.fusion if engine.runner.fusion is not None else "none",
        "device": device_name(engine.device),
        "tps": tps,
        "tps_per_gpu": tps / topology.world_size,
        "tpot_ms": work.tpot_ms(step),
        "token_latency_us": 1e6 / tps,
        "step_ms": 1e3 * step,
        "step_spread": found.step.spread,
        "step_samples_ms": _each(1e3 * s for s in found.step.samples_s),
        "mfu": work.mfu(step, topology.world_size, peak),
        "peak_flops_per_gpu": peak,
        "peak_source": peak_source,
        "flops_per_token": work.flops_per_token,
        "bytes_sent_per_rank": found.bytes_sent,
        # What prefill_only sends in its last layer depends on the model's own arguments to it: no closed form, nor for
        # what others' code sends.
        "bytes_formula": bytes_sent_per_rank(config, engine.runner.dims, work.batch, work.length, itemsize)
        if mode == "full" and config.benchmark.implementation == "ds_ring"
        else None,
        "comm_alone_ms": 1e3 * found.comm_alone.median_s if found.comm_alone else None,
        "comm_exposed_ms": 1e3 * (step - found.step_without_comm.median_s) if found.step_without_comm else None,
        "peak_memory_gib": found.peak_memory_gib,
        "rel_error": difference.rel_error if difference else None,
        "max_rel_error": difference.max_rel_error if difference else None,
        **found.gpu,
    }
