"""Several layouts on one model, one text and one batch, measured one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.baselines import rules
from benchmarks.layouts import checkpoint, counterbalance
from benchmarks.layouts.micro_batches import missing
from benchmarks.layouts.run_queue import QueuedRun, QueueResults, Report, remove_rows, rows_written, run_first
from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError, OutOfMemory
from ds_ring.hf.dims import model_dims
from ds_ring.parallel.degrees import suggest
from ds_ring.planning.validation import check_run
from ds_ring.process import launcher
from ds_ring.process.keeper import scratch_folder
from ds_ring.utils.model_config import read_config


@dataclass(frozen=True)
class Comparison:
    """Layouts to compare, each with its file. Model and workload are the same, but for the size of micro-batches."""

    runs: list[tuple[Path, RunConfig]]
    there_and_back: bool = False

    @classmethod
    def make(cls, files: Sequence[str], overrides: dict[str, Any]) -> Comparison:
        """As ``checked``, of the layouts in ``files``."""
        return cls.checked([(Path(file), RunConfig.load(file, **overrides)) for file in files])

    @classmethod
    def checked(cls, runs: list[tuple[Path, RunConfig]]) -> Comparison:
        """Refuse, before anything runs, layouts that cannot work or cannot be compared.

        Raises:
            ConfigError: a broken rule (``check_run``), layouts that differ in model, dtype or workload, or two layouts
                of one name.
        """
        if not runs:
            raise ConfigError("no layouts to compare")
        first, named = runs[0][1], dict[str, Path]()
        for file, run in runs:
            sized = run.ring.workload.model_copy(update={"micro_batch_size": first.workload.micro_batch_size})
            measured = run.benchmark.model_copy(update={"implementation": first.benchmark.implementation})
            for name, own, others in (
                ("model", run.ring.model, first.ring.model),
                ("workload", sized, first.workload),
                ("benchmark", measured, first.benchmark),
            ):
                if own != others or run.dtype != first.dtype:
                    raise ConfigError(f"{file} differs from {runs[0][0]} in {name} or dtype: they would not compare")
            if other := named.get(run.label):
                raise ConfigError(f"{other} and {file} are both {run.label}: rows of them could not be told apart")
            named[run.label] = file
            if run.parallel.auto:
                raise ConfigError(
                    f"{file} says parallel=auto; what is compared needs degrees (launch/plan.py has them)"
                )
            dims = model_dims(read_config(checkpoint.source(run)))
            check_run(run, dims, run.topology.world_size)
            rules.check(run, dims)
            rules.check_device(run, "cuda" if launcher.gpu_count() else "cpu")
        return cls(runs)

    def check_baseline(self, name: str) -> None:
        """Raise ConfigError unless ``name`` is one of the layouts: there would be nothing to compare rows with."""
        names = list(dict.fromkeys(run.label for _, run in self.runs))
        if name not in names:
            raise ConfigError(f"baseline={name} is none of the layouts; {suggest(names, '')}")

    @property
    def first(self) -> RunConfig:
        return self.runs[0][1]

    @property
    def lengths(self) -> list[int]:
        return self.first.lengths

    @property
    def steps(self) -> int:
        """How often ``run_all`` advances: for references, for layouts, and for the second half."""
        return len(self.lengths) + len(self.runs) + self.there_and_back

    @property
    def reference_sequences(self) -> int:
        """Sequences of the unsharded model's results: one for every replica of any layout."""
        return max(run.parallel.dp_size for _, run in self.runs)


def default_layouts() -> list[str]:
    """The layouts for this machine: the largest set of ds_configs/ that its GPUs allow, or the one for CPUs."""
    gpus = launcher.gpu_count()
    fitting = [n for n in (8, 4, 2) if n <= gpus]
    folder = f"gpu{fitting[0]}" if fitting else "gpu1" if gpus else "cpu4"
    return sorted(str(path) for path in (launcher.ROOT / "ds_configs" / folder).glob("*.json"))


def run_all(
    comparison: Comparison,
    logs: Path,
    advance: Callable[[], None],
    report: Report,
    keep: Callable[[QueueResults], object] = lambda found: None,
) -> QueueResults:
    """Run the unsharded model, for reference, and every layout.

    Args:
        logs: a folder for the log, the configuration and the result of every launch.
        advance: called for the reference of each length, after each layout, and after the second half.
        keep: called with the results so far after each launch, and when this is interrupted, if there are any rows.

    Raises:
        DsRingError: there is no reference to compare with.
    """
    runs = counterbalance.first_half(comparison.runs) if comparison.there_and_back else comparison.runs
    found, waiting = QueueResults(), [QueuedRun(file, run) for file, run in runs]
    for queued in waiting:  # a result of an earlier comparison must not be taken for this one's
        remove_rows(queued, logs)
    with scratch_folder() as scratch:
        references = _write_references(comparison, scratch, logs, report)
        found.unchecked.extend(comparison.lengths[len(references) :])
        for _ in comparison.lengths:
            advance()
        try:
            while waiting:
                waiting = run_first(waiting, references, logs, found, advance, report)
                if waiting and found.rows:
                    keep(found)
            if comparison.there_and_back:
                _run_second_half(comparison, logs, found, report)
                advance()
        except KeyboardInterrupt:
            for queued in waiting:
                rows = rows_written(queued, logs)
                found.rows.extend(rows)
                if missing(queued.run, rows):
                    found.not_run.append(queued.run.label)
            if found.rows:
                keep(found)
            raise
    return found


def _run_second_half(comparison: Comparison, logs: Path, found: QueueResults, report: Report) -> None:
    """Time once more the rows that count, in reverse order, and put the means into ``found``."""
    again, waiting = QueueResults(), counterbalance.second_half(comparison.runs, found.rows)
    for queued in waiting:
        remove_rows(queued, logs)
    labels = dict.fromkeys(queued.run.label for queued in waiting)
    try:
        while waiting:
            waiting = run_first(waiting, [], logs, again, lambda: None, report)
    except KeyboardInterrupt:
        # No layout gets a mean: it could not be compared with single times of the others.
        found.not_run.extend(f"{label} on the way back" for label in labels)
        raise
    found.rows[:] = counterbalance.averaged(found.rows, again.rows)
    found.failures.extend({**what, "reason": f"on the way back: {what['reason']}"} for what in again.all_failures)


def _write_references(comparison: Comparison, folder: Path, logs: Path, report: Report) -> list[str]:
    """Files of the unsharded model's results, for the shortest lengths: as far as one device can hold it."""
    run, lengths = comparison.first, comparison.lengths
    outputs = [folder / f"reference_{length}.safetensors" for length in lengths]
    arguments = ["--model", run.checkpoint, "--dtype", run.dtype, "--rows", str(comparison.reference_sequences)]
    arguments += ["--length", *map(str, lengths), "--output", *map(str, outputs)]
    arguments += ["--text", *run.benchmark.text] if run.benchmark.text else []
    try:
        launcher.run_module("benchmarks.layouts.parity", arguments, log=logs / "references.log", report=report)
    except OutOfMemory as error:
        written = [output for output in outputs if output.exists()]
        report(f"no reference from L = {lengths[len(written)]} on: {error}")
        return list(map(str, written))
    return list(map(str, outputs))
