"""What a comparison launches: layouts in turn, or several in one run; and what came of them.

On GPUs, neighbours of as many ranks share a launcher run, whose start takes as long as measuring one of them. One that
fails behind others is tried once more in a run that begins with it, so that what it is blamed for is its own. On CPUs
each has a run of its own: the peak of memory is there that of a process and all it has run. So have other
implementations, which change what they find in a process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from benchmarks.layouts.micro_batches import behind, cases, missing
from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError, DsRingError, LaunchError, OutOfMemory
from ds_ring.process import launcher
from ds_ring.utils.results import read_json, write_json

Report = Callable[[str], None]


@dataclass(frozen=True)
class Findings:
    """What ``run_all`` found. A layout that fails takes neither the others' results with it nor what it had itself.

    Attributes:
        rows: of all layouts, micro-batches, lengths and modes that ran.
        unfit: ``{"layout", "implementation", "micro_batch", "length", "mode"}`` of what did not, because a rank was out
            of memory, there or with less.
        failures: ``{"layout", "implementation", "reason"}`` of layouts that ended otherwise; one line each.
        unchecked: lengths at which the unsharded model itself was out of memory, so that there is no reference.
        not_run: where this was interrupted, layouts that did not come to their end, and those that were not timed on
            the way back.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    unfit: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    unchecked: list[int] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)

    @property
    def without_row(self) -> list[dict[str, Any]]:
        """As ``failures``, with what does not fit in micro-batches of any size."""
        ran = {(row["layout"], row["length"], row["mode"]) for row in self.rows}
        missing = [what for what in self.unfit if (what["layout"], what["length"], what["mode"]) not in ran]
        short = {
            (what["layout"], what["implementation"], f"out of memory at L = {what['length']}"): None for what in missing
        }
        return self.failures + [dict(zip(("layout", "implementation", "reason"), what, strict=True)) for what in short]


@dataclass(frozen=True)
class Job:
    """A layout, or what is left of it at its so-manieth launch; ``suffix`` tells several of one layout apart."""

    file: Path
    run: RunConfig
    launch: int = 1
    suffix: str = ""

    @property
    def name(self) -> str:
        return self.run.label + self.suffix + (f".{self.launch}" if self.launch > 1 else "")

    def output(self, logs: Path) -> Path:
        return logs / f"{self.name}.json"

    def shares_a_launch(self, other: Job) -> bool:
        ours = self.run.parallel.implementation == other.run.parallel.implementation == "ds_ring"
        alike = self.run.topology.world_size == other.run.topology.world_size
        same = self.run.workload.lengths == other.run.workload.lengths
        return ours and alike and same and launcher.gpu_count() > 0


def run_first(
    waiting: list[Job], references: list[str], logs: Path, found: Findings, advance: Callable[[], None], report: Report
) -> list[Job]:
    """Launch the first, and what can run with it; what waits afterwards."""
    first = waiting[0]
    together = [first, *takewhile(first.shares_a_launch, waiting[1:])]
    behind_them = waiting[len(together) :]
    error = _launch(together, references[: len(first.run.workload.lengths)], logs, report)
    for number, job in enumerate(together):
        rows, behind_it = rows_of(job, logs), together[number + 1 :] + behind_them
        ran = not missing(job.run, rows)
        if error is not None and not ran and job is not first:
            report(f"{job.name}: once more, first of a run; {error}")
            return [job, *behind_it]
        found.rows.extend(rows)
        if error is not None and (not ran or job is together[-1]):
            left = _blame(job, rows, error, found, report)
            if left is None:
                advance()
            return behind_it if left is None else [left, *behind_it]
        advance()
    return behind_them


def _blame(job: Job, rows: list[dict[str, Any]], error: DsRingError, found: Findings, report: Report) -> Job | None:
    """Note what ended ``job`` behind its ``rows``; what of it is left to launch."""
    whose = {"layout": job.run.label, "implementation": job.run.parallel.implementation}
    if not isinstance(error, OutOfMemory):
        report(f"{job.name} failed: {error}")
        found.failures.append({**whose, "reason": error.reason if isinstance(error, LaunchError) else str(error)})
        return None
    report(f"{job.name}: {error}")
    without_row = missing(job.run, rows)
    left = behind(job.run, without_row[0]) if without_row else None
    again = set(cases(left)) if left is not None else set()
    found.unfit.extend(
        {**whose, "micro_batch": size, "length": length, "mode": mode}
        for size, length, mode in without_row
        if (size, length, mode) not in again
    )
    return None if left is None else replace(job, run=left, launch=job.launch + 1)


def _launch(jobs: list[Job], references: list[str], logs: Path, report: Report) -> DsRingError | None:
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


def rows_of(job: Job, logs: Path) -> list[dict[str, Any]]:
    """What a run has left; it writes after every row."""
    output = job.output(logs)
    rows = read_json(output)["rows"] if output.exists() else []
    return [{**row, "config_file": job.file.name} for row in rows]
