"""The longest single sequence that a layout can hold, by forwards that complete or run out of memory.

Every attempt is a forward of the real engine in a launch of its own. When a rank runs out of memory in the middle of a
layer, the other ranks wait for messages that never come, and catching the error does not free the rank's memory. So the
rank ends, the launcher ends the others, and the next attempt starts with empty memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines import rules
from benchmarks.layouts import checkpoint
from benchmarks.layouts.length_search import Attempt, search
from benchmarks.layouts.timing import time_passes
from ds_ring.config import RunConfig
from ds_ring.engine import nan_check
from ds_ring.engine.batch import pack
from ds_ring.engine.engine import Engine
from ds_ring.engine.model_runner import Shard
from ds_ring.errors import ConfigError, DsRingError, OutOfMemory
from ds_ring.hf.dims import model_dims
from ds_ring.planning.validation import check_run
from ds_ring.process import launcher
from ds_ring.utils.corpus import text_windows, token_stream
from ds_ring.utils.device import device_name, limit_memory, memory_gib
from ds_ring.utils.model_config import read_config
from ds_ring.utils.results import read_json, write_json, write_partial

Report = Callable[[str], None]
WARMUP_TOKENS = 1024


def find(
    config: RunConfig, *, granularity: float, memory_limit_gib: float | None, limit_s: float, output: Path,
    provenance: dict[str, Any], report: Report,
) -> dict[str, Any]:  # fmt: skip
    """Search by launched attempts, from the configuration's ``max_length`` on. After each, what was found so
    far is kept beside ``output``, as a partial result.

    Raises:
        ConfigError: a layout or a granularity that cannot work. DsRingError: an attempt that failed otherwise than for
            want of memory, or took longer than ``limit_s`` seconds; or no length fits.
    """
    if not 0 < granularity <= 1:
        raise ConfigError(f"granularity={granularity} must be above 0 and at most 1; 0.02 is two percent")
    config = RunConfig.load(config, batch_size=1, micro_batch_size=1, micro_batch_sizes=(), sweep=())
    dims = model_dims(read_config(checkpoint.source(config)))
    check_run(config, dims, config.topology.world_size)
    rules.check(config, dims)
    rules.check_device(config, "cuda" if launcher.gpu_count() else "cpu")
    checkpoint.ensure(config, report)
    rows: list[dict[str, Any]] = []
    document = {
        **provenance, "config": config.document(), "layout": config.label,
        "gpus": config.topology.world_size, "dtype": config.dtype, "granularity": granularity,
        "memory_limit_gib": memory_limit_gib, "max_positions": dims.max_positions, "rows": rows,
    }  # fmt: skip

    def attempt(length: int) -> Attempt:
        made = attempt_in_a_launch(config, length, memory_limit_gib, limit_s, output.with_suffix(".logs"), report)
        report(f"L = {length:,}: " + (f"{made.seconds:.2f} s" if made.seconds else "does not fit"))
        rows.append(made.row())
        write_partial(output, document)
        return made

    most = dims.max_positions or 1 << 40
    longest, failing = search(attempt, config.workload.max_length, most, granularity)
    if longest is None:
        raise DsRingError(f"not even one token fits; see {output.with_suffix('.logs')}")
    document |= {"longest": longest.row(), "shortest_not_fitting": failing.length if failing else None}
    return document


def attempt_in_a_launch(
    config: RunConfig, length: int, memory_limit_gib: float | None, limit_s: float, logs: Path, report: Report
) -> Attempt:
    """``attempt_here`` on all ranks of a launch of its own."""
    file, output = logs / "attempt.config.json", logs / f"{length}.json"
    write_json(file, RunConfig.load(config, max_length=length).document())
    output.unlink(missing_ok=True)
    options = ["--config", str(file), "--attempt", "--output", str(output)]
    options += [] if memory_limit_gib is None else ["--memory-limit", str(memory_limit_gib)]
    try:
        launcher.launch(
            "benchmarks.cli.longest", config.topology.world_size, options, log=logs / f"{length}.log", report=report,
            timeout_s=config.ring.timeout_s, limit_s=limit_s,
        )  # fmt: skip
    except OutOfMemory:
        return Attempt(length)
    found = read_json(output)
    del found["status"]
    return Attempt(**{**found, "peak_memory_gib": tuple(found["peak_memory_gib"])})


def attempt_here(engine: Engine, memory_limit_gib: float | None) -> Attempt:
    """Time one forward of ``max_length`` tokens, after a short forward that bears the costs of first calls. Collective.

    Raises:
        PyTorch's own error, on the rank whose memory runs out only. NumericsError: logits that are not finite.
    """
    config, device = engine.run_config, engine.device
    length = config.workload.max_length
    stream = token_stream(config.checkpoint, config.benchmark.text)
    windows = (text_windows(stream, 1, n) for n in (WARMUP_TOKENS, length))
    short, whole = (pack(window, None, None, engine.runner.dims)[0] for window in windows)
    if length > WARMUP_TOKENS:
        engine.prefill(short, "last")
    if memory_limit_gib is not None:
        limit_memory(device, memory_limit_gib)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    shards: list[Shard] = []
    timing = time_passes(engine, lambda: shards.extend(engine.prefill(whole, "last")), 1)
    nan_check.require(engine.runner, all(map(nan_check.finite_shard, shards)), lambda: engine.prefill(whole, "last"))
    held = tuple(engine.gather(engine.runner.peak_memory_gib))
    return Attempt(length, timing.median_s, held, memory_gib(device, memory_limit_gib), device_name(device))
