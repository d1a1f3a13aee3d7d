"""The longest single sequence that a layout holds: doubling, then halving what is left between fits and does not.

Every trial is a forward of the real engine in a launch of its own. A rank that runs out of memory in the middle of a
layer leaves its peers waiting for messages that never come, and what it holds by then is not given back by catching the
error: so it ends, the launcher ends its peers, and the next trial starts with empty memory. An estimate from the memory
that shorter trials took only chooses where to try; what fits is always a length that ran.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.layouts.compare import ensure_checkpoint, model_source
from benchmarks.layouts.timing import time_passes
from ds_ring.config import RunConfig
from ds_ring.engine.batch import pack
from ds_ring.engine.engine import Engine
from ds_ring.engine.model_runner import Shard
from ds_ring.engine.nan_check import all_finite
from ds_ring.errors import ConfigError, DsRingError, NumericsError, OutOfMemory
from ds_ring.hf.dims import model_dims, read_config
from ds_ring.planning.validation import check_run
from ds_ring.process import launcher
from ds_ring.utils.corpus import rows_of, token_stream
from ds_ring.utils.device import device_name, limit_memory, memory_gib
from ds_ring.utils.results import read_json, write_json

Report = Callable[[str], None]
WARMUP_TOKENS = 1024


@dataclass(frozen=True)
class Trial:
    """One forward of one sequence.

    Attributes:
        seconds: of the forward, to the logits of the last token, on the slowest rank; None where it does not fit.
        peak_memory_gib: the most that each rank held.
        memory_gib: what each may hold; None on CPUs.
    """

    length: int
    seconds: float | None = None
    peak_memory_gib: tuple[float, ...] = ()
    memory_gib: float | None = None
    device: str | None = None

    @property
    def fits(self) -> bool:
        return self.seconds is not None

    def row(self) -> dict[str, Any]:
        tokens_per_second = self.length / self.seconds if self.seconds else None
        return {**asdict(self), "fits": self.fits, "tokens_per_second": tokens_per_second}


def search(
    attempt: Callable[[int], Trial], first: int, most: int, granularity: float
) -> tuple[Trial | None, Trial | None]:
    """(the longest that fits, the shortest that does not), of which the second is at most ``granularity`` longer.

    Args:
        first: the length that is tried first.
        most: longer ones are not tried; where it fits, nothing is known not to.
    """
    fitting: list[Trial] = []
    failing: Trial | None = None

    def attempted(length: int) -> bool:
        nonlocal failing
        trial = attempt(length)
        if trial.fits:
            fitting.append(trial)
        else:
            failing = trial
        return trial.fits

    length = min(first, most)
    while attempted(length) and length < most:
        length = min(2 * length, most)
    while not fitting and length > 1:
        length //= 2
        attempted(length)
    if not fitting or failing is None:
        return (fitting[-1] if fitting else None), failing
    guesses = _around(_predict(fitting), granularity)
    while failing.length > max(fitting[-1].length * (1 + granularity), fitting[-1].length + 1):
        low, high = fitting[-1].length, failing.length
        halfway = min(max(round((low * high) ** 0.5), low + 1), high - 1)
        attempted(next((guess for guess in guesses if low < guess < high), halfway))
    return fitting[-1], failing


def _around(length: float | None, granularity: float) -> tuple[int, ...]:
    """Two lengths that are ``granularity`` apart, with ``length`` between them: if it is right, they settle it."""
    half = (1 + granularity) ** 0.5
    return () if length is None else (int(length / half) + 1, int(length * half))


def _predict(fitting: list[Trial]) -> float | None:
    """Where memory runs out if the fullest rank goes on growing as it did between the two longest that fit."""
    if len(fitting) < 2 or fitting[-1].memory_gib is None:
        return None
    (short, less), (long, more) = ((trial.length, max(trial.peak_memory_gib)) for trial in fitting[-2:])
    return long + (fitting[-1].memory_gib - more) * (long - short) / (more - less) if more > less else None


def find(
    config: RunConfig, *, granularity: float, memory_limit_gib: float | None, limit_s: float, output: Path,
    provenance: dict[str, Any], report: Report,
) -> dict[str, Any]:  # fmt: skip
    """Search by launched trials, beginning at the configuration's ``max_length``; ``output`` is written after each.

    Raises:
        ConfigError: a layout or a granularity that cannot work. DsRingError: a trial that failed otherwise than by its
            memory, or took longer than ``limit_s``; or no length fits.
    """
    if not 0 < granularity <= 1:
        raise ConfigError(f"granularity={granularity} must be above 0 and at most 1; 0.02 is two percent")
    config = RunConfig.load(config, batch_size=1, micro_batch_size=1, micro_batch_sizes=(), sweep=())
    dims = model_dims(read_config(model_source(config)))
    check_run(config, dims, config.topology.world_size)
    ensure_checkpoint(config, report)
    rows: list[dict[str, Any]] = []
    document = {
        **provenance, "config": config.document(), "layout": config.label,
        "gpus": config.topology.world_size, "dtype": config.dtype, "granularity": granularity,
        "memory_limit_gib": memory_limit_gib, "max_positions": dims.max_positions, "rows": rows,
    }  # fmt: skip

    def attempt(length: int) -> Trial:
        trial = launched(config, length, memory_limit_gib, limit_s, output.with_suffix(".logs"), report)
        report(f"L = {length:,}: " + (f"{trial.seconds:.2f} s" if trial.seconds else "does not fit"))
        rows.append(trial.row())
        write_json(output, document)
        return trial

    most = dims.max_positions or 1 << 40
    fits, does_not = search(attempt, config.workload.max_length, most, granularity)
    if fits is None:
        raise DsRingError(f"not even one token fits; see {output.with_suffix('.logs')}")
    document |= {"longest": fits.row(), "shortest_not_fitting": does_not.length if does_not else None}
    write_json(output, document)
    return document


def launched(
    config: RunConfig, length: int, memory_limit_gib: float | None, limit_s: float, logs: Path, report: Report
) -> Trial:
    """``trial`` in a launch of its own."""
    file, output = logs / "trial.config.json", logs / f"{length}.json"
    write_json(file, RunConfig.load(config, max_length=length).document())
    output.unlink(missing_ok=True)
    options = ["--config", str(file), "--trial", "--output", str(output)]
    options += [] if memory_limit_gib is None else ["--memory-limit", str(memory_limit_gib)]
    try:
        launcher.launch(
            "launch/longest.py", config.topology.world_size, options, log=logs / f"{length}.log", report=report,
            limit_s=limit_s,
        )  # fmt: skip
    except OutOfMemory:
        return Trial(length)
    found = read_json(output)
    return Trial(**{**found, "peak_memory_gib": tuple(found["peak_memory_gib"])})


def trial(engine: Engine, memory_limit_gib: float | None) -> Trial:
    """One forward of ``max_length`` tokens, timed, behind a short one that takes what first calls cost.

    Raises:
        what PyTorch raises on the rank whose memory runs out, alone. NumericsError: logits that are not finite.
    """
    config, device = engine.run_config, engine.device
    length = config.workload.max_length
    stream = token_stream(config.checkpoint, config.workload.text)
    short, whole = (pack(rows_of(stream, 1, n), None, None, engine.runner.dims)[0] for n in (WARMUP_TOKENS, length))
    if length > WARMUP_TOKENS:
        engine.prefill(short, "last")
    if memory_limit_gib is not None:
        limit_memory(device, memory_limit_gib)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    shards: list[Shard] = []
    timing = time_passes(engine, lambda: shards.extend(engine.prefill(whole, "last")), 1)
    if not all(all_finite(shard.logits_BkV) for shard in shards):
        raise NumericsError(f"logits behind {length} tokens are not finite")
    held = tuple(engine.gather(engine.runner.peak_memory_gib))
    return Trial(length, timing.median_s, held, memory_gib(device, memory_limit_gib), device_name(device))
