"""Several layouts on one model, one text and one batch, one after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.baselines import rules
from benchmarks.layouts import counterbalance
from benchmarks.layouts.micro_batches import missing
from benchmarks.layouts.run_queue import Findings, Job, Report, rows_of, run_first
from ds_ring.cli.make_checkpoint import make_checkpoint
from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError, OutOfMemory
from ds_ring.hf.dims import model_dims, read_config
from ds_ring.parallel.degrees import suggest
from ds_ring.planning.validation import check_run
from ds_ring.process import launcher


@dataclass(frozen=True)
class Comparison:
    """What will be run: layouts by file, with the same model and workload, micro-batches of their own size."""

    runs: list[tuple[Path, RunConfig]]
    there_and_back: bool = False

    @classmethod
    def make(cls, files: Sequence[str], overrides: dict[str, Any]) -> Comparison:
        """Load every layout; otherwise as ``checked``."""
        return cls.checked([(Path(file), RunConfig.load(file, **overrides)) for file in files])

    @classmethod
    def checked(cls, runs: list[tuple[Path, RunConfig]]) -> Comparison:
        """Refuse, before anything runs, layouts that cannot work or do not compare.

        Raises:
            ConfigError: a broken rule (``check_run``), layouts that differ in model, dtype or workload, or that go by
                one name.
        """
        if not runs:
            raise ConfigError("no layouts to compare")
        first, named = runs[0][1], dict[str, Path]()
        for file, run in runs:
            sized = run.ring.workload.model_copy(update={"micro_batch_size": first.workload.micro_batch_size})
            for name, own, others in (
                ("model", run.ring.model, first.ring.model), ("workload", sized, first.ring.workload),
            ):  # fmt: skip
                if own != others or run.dtype != first.dtype:
                    raise ConfigError(f"{file} differs from {runs[0][0]} in {name} or dtype: they would not compare")
            if other := named.get(run.label):
                raise ConfigError(f"{other} and {file} are both {run.label}: rows of them could not be told apart")
            named[run.label] = file
            if run.parallel.auto:
                raise ConfigError(
                    f"{file} says parallel=auto; what is compared needs degrees (launch/plan.py has them)"
                )
            dims = model_dims(read_config(model_source(run)))
            check_run(run, dims, run.topology.world_size)
            rules.check(run, dims)
            rules.check_device(run, "cuda" if launcher.gpu_count() else "cpu")
        return cls(runs)

    def check_baseline(self, name: str) -> None:
        """Raise ConfigError unless it is one of the layouts: no row would have anything to refer to."""
        names = list(dict.fromkeys(run.label for _, run in self.runs))
        if name not in names:
            raise ConfigError(f"baseline={name} is none of the layouts; {suggest(names, '')}")

    @property
    def first(self) -> RunConfig:
        return self.runs[0][1]

    @property
    def lengths(self) -> list[int]:
        return self.first.workload.lengths

    @property
    def steps(self) -> int:
        """References, layouts and the way back: how often ``run_all`` advances."""
        return len(self.lengths) + len(self.runs) + self.there_and_back

    @property
    def parity_rows(self) -> int:
        """Every replica of every layout needs a row to check."""
        return max(run.parallel.dp_size for _, run in self.runs)


def default_layouts() -> list[str]:
    """The layouts for the hardware at hand: the largest set that its GPUs allow, else CPUs."""
    gpus = launcher.gpu_count()
    fitting = [n for n in (8, 4, 2) if n <= gpus]
    folder = f"gpu{fitting[0]}" if fitting else "gpu1" if gpus else "cpu4"
    return sorted(str(path) for path in (launcher.ROOT / "ds_configs" / folder).glob("*.json"))


def model_source(run: RunConfig) -> Path:
    """The checkpoint directory, or, while there is none, the config in ds_configs/models/ it is made from."""
    directory = Path(run.checkpoint)
    recipe = launcher.ROOT / "ds_configs" / "models" / f"{directory.name}.json"
    return directory if directory.is_dir() or not recipe.is_file() else recipe


def ensure_checkpoint(run: RunConfig, report: Report) -> None:
    """Make the checkpoint where there is only its recipe; an interruption leaves none, not half of one."""
    source, directory = model_source(run), Path(run.checkpoint)
    if source.is_dir():
        return
    report(f"make {directory} from {source}")
    device = "cuda" if launcher.gpu_count() else "cpu"
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        made = Path(scratch) / directory.name
        make_checkpoint(source, made, seed=0, dtype=run.dtype, device=device)
        made.rename(directory)


def run_all(
    plan: Comparison,
    logs: Path,
    advance: Callable[[], None],
    report: Report,
    keep: Callable[[Findings], object] = lambda found: None,
) -> Findings:
    """Run the reference and every layout.

    Args:
        logs: a folder for every run's log, its configuration as it was run, and each layout's own result.
        advance: called for the reference of each length, after each layout, and after the way back.
        keep: is given what there is when this is interrupted, if it is anything.

    Raises:
        ConfigError: a run refused. DsRingError: there is no reference to compare with.
    """
    runs = counterbalance.way_there(plan.runs) if plan.there_and_back else plan.runs
    found, waiting = Findings(), [Job(file, run) for file, run in runs]
    for job in waiting:  # an earlier run's result must not pass for this one's
        job.output(logs).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        references = _write_references(plan, Path(scratch), logs, report)
        found.unchecked.extend(plan.lengths[len(references) :])
        for _ in plan.lengths:
            advance()
        try:
            while waiting:
                waiting = run_first(waiting, references, logs, found, advance, report)
            if plan.there_and_back:
                _go_back(plan, logs, found, report)
                advance()
        except KeyboardInterrupt:
            for job in waiting:
                rows = rows_of(job, logs)
                found.rows.extend(rows)
                if missing(job.run, rows):
                    found.not_run.append(job.run.label)
            if found.rows:
                keep(found)
            raise
    return found


def _go_back(plan: Comparison, logs: Path, found: Findings, report: Report) -> None:
    """Time once more what counts, and put the means into ``found``."""
    again, waiting = Findings(), counterbalance.jobs(plan.runs, found.rows)
    for job in waiting:
        job.output(logs).unlink(missing_ok=True)
    labels = dict.fromkeys(job.run.label for job in waiting)
    try:
        while waiting:
            waiting = run_first(waiting, [], logs, again, lambda: None, report)
    except KeyboardInterrupt:
        # Of all: means of some would not compare with what the others took on the way there.
        found.not_run.extend(f"{label} on the way back" for label in labels)
        raise
    found.rows[:] = counterbalance.averaged(found.rows, again.rows)
    found.failures.extend({**what, "reason": f"on the way back: {what['reason']}"} for what in again.without_row)


def _write_references(plan: Comparison, folder: Path, logs: Path, report: Report) -> list[str]:
    """Files of the unsharded model's results, for the shortest lengths: one device must hold it."""
    run = plan.first
    outputs = [folder / f"reference_{length}.safetensors" for length in plan.lengths]
    arguments = ["--model", str(run.ring.model), "--dtype", run.dtype, "--rows", str(plan.parity_rows)]
    arguments += ["--length", *map(str, plan.lengths), "--output", *map(str, outputs)]
    arguments += ["--text", *run.workload.text] if run.workload.text else []
    try:
        launcher.run_module("benchmarks.layouts.parity", arguments, log=logs / "references.log", report=report)
    except OutOfMemory as error:
        written = [output for output in outputs if output.exists()]
        report(f"no reference from L = {plan.lengths[len(written)]} on: {error}")
        return list(map(str, written))
    return list(map(str, outputs))
