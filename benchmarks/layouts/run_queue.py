"""The launches of a comparison: layouts in turn, or several in one launch, and what they found.

On GPUs, neighbouring layouts with equally many ranks share a launch, because starting one takes as long as measuring
one of them. A layout that fails after others in the same launch is tried again as the first of a new launch, so that no
other layout can be the cause. On CPUs each layout has a launch of its own: the peak of memory is there that of the
process, with everything it has run. So have baselines, which change the process they run in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from benchmarks.layouts.micro_batches import cases, missing, remaining_after
from ds_ring.config import RunConfig
from ds_ring.errors import DsRingError, LaunchError, OutOfMemory, in_one_line
from ds_ring.process import launcher
from ds_ring.utils.output_file import partial_of
from ds_ring.utils.plain_text import one_line
from ds_ring.utils.results import read_json, write_json

Report = Callable[[str], None]


@dataclass(frozen=True)
class QueueResults:
    """What launches found. A layout that fails loses neither the others' rows nor those it had itself.

    Attributes:
        rows: of all layouts, sizes of micro-batches, lengths and modes that ran.
        unfit: ``{"layout", "implementation", "micro_batch", "length", "mode"}`` of cases that did not run, because a
            rank was out of memory there or in a smaller case.
        failures: ``{"layout", "implementation", "reason"}`` of layouts that failed otherwise; one line each.
        unchecked: lengths at which the unsharded model itself was out of memory, so that there is no reference.
        not_run: after an interruption, layouts that were not finished, in the first half or in the second.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    unfit: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    unchecked: list[int] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)

    @property
    def all_failures(self) -> list[dict[str, Any]]:
        """``failures``, and the lengths of each layout that fit with no size of micro-batch, in the same form."""
        ran = {(row["layout"], row["length"], row["mode"]) for row in self.rows}
        absent = [what for what in self.unfit if (what["layout"], what["length"], what["mode"]) not in ran]
        reasons = {
            (what["layout"], what["implementation"], f"out of memory at L = {what['length']}"): None for what in absent
        }
        names = ("layout", "implementation", "reason")
        return self.failures + [dict(zip(names, values, strict=True)) for values in reasons]


@dataclass(frozen=True)
class QueuedRun:
    """A layout to measure, or the cases that are left of it.

    Attributes:
        launch: how many launches the layout has had, with this one.
        suffix: tells several queued runs of one layout apart.
    """

    file: Path
    run: RunConfig
    launch: int = 1
    suffix: str = ""

    @property
    def name(self) -> str:
        return self.run.label + self.suffix + (f".{self.launch}" if self.launch > 1 else "")

    def output(self, logs: Path) -> Path:
        return logs / f"{self.name}.json"

    def shares_a_launch(self, other: QueuedRun) -> bool:
        ours = self.run.benchmark.implementation == other.run.benchmark.implementation == "ds_ring"
        alike = self.run.topology.world_size == other.run.topology.world_size
        same = self.run.lengths == other.run.lengths
        return ours and alike and same and launcher.gpu_count() > 0


def run_first(
    waiting: list[QueuedRun],
    references: list[str],
    logs: Path,
    found: QueueResults,
    advance: Callable[[], None],
    report: Report,
) -> list[QueuedRun]:
    """Launch the first of ``waiting`` and those that share its launch. Returns what is waiting afterwards."""
    first = waiting[0]
    together = [first, *takewhile(first.shares_a_launch, waiting[1:])]
    later = waiting[len(together) :]
    error = _launch(together, references[: len(first.run.lengths)], logs, report)
    for number, queued in enumerate(together):
        rows, after = rows_written(queued, logs), together[number + 1 :] + later
        complete = not missing(queued.run, rows)
        if error is not None and not complete and queued is not first:
            report(f"{queued.name}: once more, first of a launch; {error}")
            return [queued, *after]
        found.rows.extend(rows)
        if error is not None and (not complete or queued is together[-1]):
            left = _note_failure(queued, rows, error, found, report)
            if left is None:
                advance()
            return after if left is None else [left, *after]
        advance()
    return later


def _note_failure(
    queued: QueuedRun, rows: list[dict[str, Any]], error: Exception, found: QueueResults, report: Report
) -> QueuedRun | None:
    """Put into ``found`` why ``queued`` ended after ``rows``. Returns the part of it that is still to be launched."""
    whose = {"layout": queued.run.label, "implementation": queued.run.benchmark.implementation}
    if not isinstance(error, OutOfMemory):
        report(f"{queued.name} failed: {error if isinstance(error, DsRingError) else in_one_line(error)}")
        found.failures.append({**whose, "reason": _reason(error)})
        return None
    report(f"{queued.name}: {error}")
    absent = missing(queued.run, rows)
    left = remaining_after(queued.run, absent[0]) if absent else None
    again = set(cases(left)) if left is not None else set()
    found.unfit.extend(
        {**whose, "micro_batch": size, "length": length, "mode": mode}
        for size, length, mode in absent
        if (size, length, mode) not in again
    )
    return None if left is None else replace(queued, run=left, launch=queued.launch + 1)


def _reason(error: Exception) -> str:
    """Why a launch failed, in one line."""
    if isinstance(error, LaunchError):
        return one_line(error.reason)
    return one_line(str(error)) if isinstance(error, DsRingError) else in_one_line(error)


def _launch(together: list[QueuedRun], references: list[str], logs: Path, report: Report) -> Exception | None:
    """Launch ``together``. Returns the error that ended it early, if any, of whatever kind: what was found of other
    layouts is kept. Rows are in a file for each queued run."""
    first = together[0]
    ranks = first.run.topology.world_size
    report(f"{', '.join(queued.name for queued in together)}: start {ranks} ranks")
    log = logs / f"{first.name}.log"
    try:
        launcher.launch(
            "benchmarks.cli.bench", ranks, _options(together, references, logs), log=log, report=report,
            timeout_s=first.run.ring.timeout_s,
        )  # fmt: skip
    except Exception as error:
        return error
    without = [queued.name for queued in together if not queued.output(logs).exists()]
    return DsRingError(f"the launcher ended without a result of {', '.join(without)}; see {log}") if without else None


def _options(together: list[QueuedRun], references: list[str], logs: Path) -> list[str]:
    """Options of ``bench.py`` for one launch of all. Writes their configurations, and removes earlier results."""
    arguments: list[str] = []
    for queued in together:
        config, output = logs / f"{queued.name}.config.json", queued.output(logs)
        write_json(config, queued.run.document())
        remove_rows(queued, logs)
        files = [str(config), str(output)]
        arguments += ["--config", files[0], "--output", files[1]] if queued is together[0] else ["--then", *files]
    return arguments + (["--references", *references] if references else [])


def rows_written(queued: QueuedRun, logs: Path) -> list[dict[str, Any]]:
    """The rows that a launch has written, whether or not it got to its end; it writes after every row."""
    files = [file for file in _files(queued, logs) if file.exists()]
    rows = read_json(files[0], partial=True)["rows"] if files else []
    return [{**row, "config_file": queued.file.name} for row in rows]


def remove_rows(queued: QueuedRun, logs: Path) -> None:
    """Remove what an earlier launch has written: it must not be taken for this one's."""
    for file in _files(queued, logs):
        file.unlink(missing_ok=True)


def _files(queued: QueuedRun, logs: Path) -> list[Path]:
    return [queued.output(logs), partial_of(queued.output(logs))]
