"""Several layouts on one model, one text and one batch, one after the other.

On GPUs, neighbours of as many ranks share a launcher run, whose start takes as long as measuring one of them. One that
fails behind others is tried once more in a run that begins with it, so that what it is blamed for is its own. On CPUs
each has a run of its own: the peak of memory is there that of a process and all it has run. So have other
implementations, which change what they find in a process.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from ds_ring import launcher
from ds_ring.checkpoints import make_checkpoint
from ds_ring.checks import check_device, check_run
from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError, DsRingError, LaunchError, OutOfMemory
from ds_ring.hf.shape import model_shape, read_config
from ds_ring.micro_batches import behind, case_of, cases
from ds_ring.results import read_json, write_json

Report = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What will be run: layouts by file, all with the same model and workload."""

    runs: list[tuple[Path, RunConfig]]

    @classmethod
    def make(cls, files: Sequence[str], overrides: dict[str, Any]) -> Plan:
        """Load every layout; otherwise as ``checked``."""
        return cls.checked([(Path(file), RunConfig.load(file, **overrides)) for file in files])

    @classmethod
    def checked(cls, runs: list[tuple[Path, RunConfig]]) -> Plan:
        """Refuse, before anything runs, layouts that cannot work or do not compare.

        Raises:
            ConfigError: a broken rule (``check_run``), or layouts that differ in model, dtype or workload.
        """
        if not runs:
            raise ConfigError("no layouts to compare")
        first = runs[0][1]
        for file, run in runs:
            for name in ("model", "workload"):
                if getattr(run.ring, name) != getattr(first.ring, name) or run.dtype != first.dtype:
                    raise ConfigError(f"{file} differs from {runs[0][0]} in {name} or dtype: they would not compare")
            if run.parallel.auto:
                raise ConfigError(
                    f"{file} says parallel=auto; what is compared needs degrees (launch/plan.py has them)"
                )
            check_run(run, model_shape(read_config(model_source(run))), run.topology.world_size)
            check_device(run, "cuda" if launcher.gpu_count() else "cpu")
        return cls(runs)

    @property
    def first(self) -> RunConfig:
        return self.runs[0][1]

    @property
    def lengths(self) -> list[int]:
        return self.first.workload.lengths

    @property
    def steps(self) -> int:
        """References and layouts: how often ``run_all`` advances."""
        return len(self.lengths) + len(self.runs)

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


@dataclass(frozen=True)
class Outcome:
    """What ``run_all`` found. A layout that fails takes neither the others' results with it nor what it had itself.

    Attributes:
        rows: of all layouts, micro-batches, lengths and modes that ran.
        unfit: ``{"layout", "implementation", "micro_batch", "length", "mode"}`` of what did not, because a rank was out
            of memory, there or with less.
        failures: ``{"layout", "implementation", "reason"}`` of layouts that ended otherwise; one line each.
        unchecked: lengths at which the unsharded model itself was out of memory, so that there is no reference.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    unfit: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    unchecked: list[int] = field(default_factory=list)

    @property
    def without_row(self) -> list[dict[str, Any]]:
        """As ``failures``, with what does not fit in micro-batches of any size."""
        ran = {(row["layout"], row["length"], row["mode"]) for row in self.rows}
        missing = [what for what in self.unfit if (what["layout"], what["length"], what["mode"]) not in ran]
        short = {
            (what["layout"], what["implementation"], f"out of memory at L = {what['length']}"): None for what in missing
        }
        return self.failures + [dict(zip(("layout", "implementation", "reason"), what, strict=True)) for what in short]


def run_all(
    plan: Plan,
    logs: Path,
    advance: Callable[[], None],
    report: Report,
    keep: Callable[[Outcome], object] = lambda found: None,
) -> Outcome:
    """Run the reference and every layout.

    Args:
        logs: a folder for every run's log, its configuration as it was run, and each layout's own result.
        advance: called for the reference of each length and after each layout.
        keep: is given what there is when this is interrupted.

    Raises:
        ConfigError: a run refused. DsRingError: there is no reference to compare with.
    """
    found, waiting = Outcome(), [_Job(file, run) for file, run in plan.runs]
    for job in waiting:  # an earlier run's result must not pass for this one's
        job.output(logs).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        references = _write_references(plan, Path(scratch), logs, report)
        found.unchecked.extend(plan.lengths[len(references) :])
        for _ in plan.lengths:
            advance()
        try:
            while waiting:
                waiting = _run_first(waiting, references, logs, found, advance, report)
        except KeyboardInterrupt:
            for job in waiting:
                found.rows.extend(_rows(job, logs))
            keep(found)
            raise
    return found


@dataclass(frozen=True)
class _Job:
    """A layout, or what is left of it at its so-manieth launch."""

    file: Path
    run: RunConfig
    launch: int = 1

    @property
    def name(self) -> str:
        return self.file.stem if self.launch == 1 else f"{self.file.stem}.{self.launch}"

    def output(self, logs: Path) -> Path:
        return logs / f"{self.name}.json"

    def shares_a_launch(self, other: _Job) -> bool:
        ours = self.run.parallel.implementation == other.run.parallel.implementation == "ds_ring"
        alike = self.run.topology.world_size == other.run.topology.world_size
        return ours and alike and self.run.ring.workload == other.run.ring.workload and launcher.gpu_count() > 0


def _run_first(
    waiting: list[_Job], references: list[str], logs: Path, found: Outcome, advance: Callable[[], None], report: Report
) -> list[_Job]:
    """Launch the first, and what can run with it; what waits afterwards."""
    first = waiting[0]
    together = [first, *takewhile(first.shares_a_launch, waiting[1:])]
    behind_them = waiting[len(together) :]
    error = _launch(together, references[: len(first.run.workload.lengths)], logs, report)
    for number, job in enumerate(together):
        rows = _rows(job, logs)
        ended_here = error is not None and (job is together[-1] or not _ran(job, rows))
        if ended_here and job is not first and not _ran(job, rows):
            report(f"{job.name}: once more, first of a run; {error}")
            return together[number:] + behind_them
        found.rows.extend(rows)
        left = _blame(job, rows, error, found, report) if error is not None and ended_here else None
        if left is not None:
            return [left, *together[number + 1 :], *behind_them]
        advance()
        if ended_here:
            return together[number + 1 :] + behind_them
    return behind_them


def _ran(job: _Job, rows: list[dict[str, Any]]) -> bool:
    return set(cases(job.run)) <= set(map(case_of, rows))


def _blame(job: _Job, rows: list[dict[str, Any]], error: DsRingError, found: Outcome, report: Report) -> _Job | None:
    """Note what ended ``job`` behind its ``rows``; what of it is left to launch."""
    whose = {"layout": job.run.label, "implementation": job.run.parallel.implementation}
    if not isinstance(error, OutOfMemory):
        report(f"{job.name} failed: {error}")
        found.failures.append({**whose, "reason": error.reason if isinstance(error, LaunchError) else str(error)})
        return None
    report(f"{job.name}: {error}")
    ran = set(map(case_of, rows))
    missing = [case for case in cases(job.run) if case not in ran]
    left = behind(job.run, missing[0]) if missing else None
    again = set(cases(left)) if left is not None else set()
    found.unfit.extend(
        {**whose, "micro_batch": size, "length": length, "mode": mode}
        for size, length, mode in missing
        if (size, length, mode) not in again
    )
    return None if left is None else _Job(job.file, left, job.launch + 1)


def _launch(jobs: list[_Job], references: list[str], logs: Path, report: Report) -> DsRingError | None:
    """What ended the run that measures ``jobs`` before its time; each job's rows are in a file of its name."""
    first = jobs[0]
    ranks = first.run.topology.world_size
    report(f"{', '.join(job.name for job in jobs)}: start {ranks} ranks")
    arguments: list[str] = []
    for job in jobs:
        config, output = logs / f"{job.name}.config.json", job.output(logs)
        write_json(config, job.run.document())
        output.unlink(missing_ok=True)
        files = [str(config), str(output)]
        arguments += ["--config", files[0], "--output", files[1]] if job is first else ["--then", *files]
    arguments += ["--references", *references] if references else []
    log = logs / f"{first.name}.log"
    try:
        launcher.launch("launch/bench.py", ranks, arguments, log=log, report=report)
    except ConfigError as refusal:
        if first.run.parallel.implementation == "ds_ring":
            raise
        return refusal
    except DsRingError as failure:
        return failure
    without = [job.name for job in jobs if not job.output(logs).exists()]
    return DsRingError(f"the launcher ended without a result of {', '.join(without)}; see {log}") if without else None


def _rows(job: _Job, logs: Path) -> list[dict[str, Any]]:
    """What a run has left; it writes after every row."""
    output = job.output(logs)
    rows = read_json(output)["rows"] if output.exists() else []
    return [{**row, "config_file": job.file.name} for row in rows]


def _write_references(plan: Plan, folder: Path, logs: Path, report: Report) -> list[str]:
    """Files of the unsharded model's results, for the shortest lengths: one device must hold it."""
    run = plan.first
    outputs = [folder / f"reference_{length}.safetensors" for length in plan.lengths]
    arguments = ["--model", str(run.ring.model), "--dtype", run.dtype, "--rows", str(plan.parity_rows)]
    arguments += ["--length", *map(str, plan.lengths), "--output", *map(str, outputs)]
    arguments += ["--text", *run.workload.text] if run.workload.text else []
    try:
        launcher.run_module("ds_ring.parity", arguments, log=logs / "references.log", report=report)
    except OutOfMemory as error:
        written = [output for output in outputs if output.exists()]
        report(f"no reference from L = {plan.lengths[len(written)]} on: {error}")
        return list(map(str, written))
    return list(map(str, outputs))
