"""Several layouts on one model, one text and one batch, each in a launcher run of its own, one after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
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


def run_all(plan: Plan, logs: Path, advance: Callable[[], None], report: Report) -> Outcome:
    """Run the reference and every layout.

    Args:
        logs: a folder for every run's log, its configuration as it was run, and each layout's own result.
        advance: called after the reference of each length and after each layout.

    Raises:
        ConfigError: a run refused. DsRingError: there is no reference to compare with.
    """
    found = Outcome()
    with tempfile.TemporaryDirectory() as scratch:
        references: list[str] = []
        for length in plan.lengths:
            reference = Path(scratch) / f"reference_{length}.safetensors"
            if not found.unchecked and _write_reference(plan, length, reference, logs, report):
                references.append(str(reference))
            else:
                found.unchecked.append(length)
            advance()
        for file, layout in plan.runs:
            _run_layout(file, layout, references, logs, found, report)
            advance()
    return found


def _run_layout(
    file: Path, layout: RunConfig, references: list[str], logs: Path, found: Outcome, report: Report
) -> None:
    """Launch it until every case has run or is known not to fit."""
    left: RunConfig | None = layout
    names = (file.stem if n == 1 else f"{file.stem}.{n}" for n in count(1))
    whose = {"layout": layout.label, "implementation": layout.parallel.implementation}
    while left is not None:
        name, run, left = next(names), left, None
        rows, error = _launch(name, run, references[: len(run.workload.lengths)], logs, report)
        found.rows.extend({**row, "config_file": file.name} for row in rows)
        if isinstance(error, OutOfMemory):
            report(f"{name}: {error}")
            ran = set(map(case_of, rows))
            missing = [case for case in cases(run) if case not in ran]
            left = behind(run, missing[0]) if missing else None
            again = set(cases(left)) if left is not None else set()
            found.unfit.extend(
                {**whose, "micro_batch": size, "length": length, "mode": mode}
                for size, length, mode in missing
                if (size, length, mode) not in again
            )
        elif error is not None:
            report(f"{name} failed: {error}")
            reason = error.reason if isinstance(error, LaunchError) else str(error)
            found.failures.append({**whose, "reason": reason})


def _launch(
    name: str, run: RunConfig, references: list[str], logs: Path, report: Report
) -> tuple[list[dict[str, Any]], DsRingError | None]:
    """The rows that a launch left, and what ended it early."""
    ranks = run.topology.world_size
    report(f"{name}: start {ranks} ranks")
    config, output = logs / f"{name}.config.json", logs / f"{name}.json"
    write_json(config, run.document())
    output.unlink(missing_ok=True)  # an earlier run's result must not pass for this one's
    arguments = ["--config", str(config), "--output", str(output)]
    arguments += ["--references", *references] if references else []
    error: DsRingError | None = None
    try:
        launcher.launch("launch/bench.py", ranks, arguments, log=logs / f"{name}.log", report=report)
        if not output.exists():
            raise DsRingError(f"the launcher ended without a result; see {logs / name}.log")
    except ConfigError as refusal:
        if run.parallel.implementation == "ds_ring":
            raise
        error = refusal
    except DsRingError as failure:
        error = failure
    return _rows(output), error


def _rows(output: Path) -> list[dict[str, Any]]:
    """What a run has left; it writes after every row."""
    return list(read_json(output)["rows"]) if output.exists() else []


def _write_reference(plan: Plan, length: int, output: Path, logs: Path, report: Report) -> bool:
    """Whether the unsharded model could be run at ``length``; one device must hold it."""
    run = plan.first
    arguments = ["--model", str(run.ring.model), "--dtype", run.dtype, "--output", str(output)]
    arguments += ["--rows", str(plan.parity_rows), "--length", str(length)]
    arguments += ["--text", *run.workload.text] if run.workload.text else []
    report(f"reference: the unsharded model, L = {length}")
    try:
        launcher.run_module("ds_ring.parity", arguments, log=logs / f"reference_{length}.log", report=report)
    except OutOfMemory as error:
        report(f"no reference from L = {length} on: {error}")
        return False
    return True
