"""Several layouts on one model, one text and one batch, each in a launcher run of its own, one after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_ring import launcher
from ds_ring.checkpoints import make_checkpoint
from ds_ring.checks import check_run
from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError, DsRingError, OutOfMemory
from ds_ring.hf.shape import model_shape, read_config
from ds_ring.results import read_json, write_json

TOLERANCE = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 4e-2}
"""Largest relative error against the unsharded model that counts as the same computation."""

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
        rows: of all layouts, lengths and modes that ran.
        unfit: ``{"layout", "length", "mode"}`` of what did not, because a rank was out of memory.
        failures: names of layouts that ended otherwise.
        unchecked: lengths at which the unsharded model itself was out of memory, so that there is no reference.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    unfit: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    unchecked: list[int] = field(default_factory=list)


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
    name, ranks = file.stem, layout.topology.world_size
    report(f"{name}: start {ranks} ranks")
    config, output = logs / f"{name}.config.json", logs / f"{name}.json"
    write_json(config, layout.document())
    output.unlink(missing_ok=True)  # an earlier run's result must not pass for this one's
    arguments = ["--config", str(config), "--output", str(output)]
    arguments += ["--references", *references] if references else []
    wanted = [(length, mode) for length in layout.workload.lengths for mode in layout.workload.modes]
    try:
        launcher.launch("launch/bench.py", ranks, arguments, log=logs / f"{name}.log", report=report)
        if not output.exists():
            raise DsRingError(f"the launcher ended without a result; see {logs / name}.log")
    except ConfigError:
        raise
    except OutOfMemory as error:
        report(f"{name}: {error}")
        ran = {(row["length"], row["mode"]) for row in _rows(output)}
        label = layout.topology.label()
        found.unfit.extend(
            {"layout": label, "length": length, "mode": mode} for length, mode in wanted if (length, mode) not in ran
        )
    except DsRingError as error:
        report(f"{name} failed: {error}")
        found.failures.append(name)
    found.rows.extend({**row, "config_file": file.name} for row in _rows(output))


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


def judge(
    rows: list[dict[str, Any]], baseline: str | None = None, unchecked: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """Add to each row, within its length and mode: ``vs_baseline`` and ``vs_dp`` (ratios of TPS), ``agrees``, which is
    None at lengths that are ``unchecked``.

    The baseline is the layout of that name, or the fastest that uses tensor or pipeline parallelism. Where each run
    timed its own peak, the highest stands for all: a noisy moment must not flatter a layout's MFU.
    """
    peak = max(row["peak_flops_per_gpu"] for row in rows)
    judged = []
    for row in rows:
        alike = [r for r in rows if (r["length"], r["mode"]) == (row["length"], row["mode"])]
        base = _tps([r for r in alike if r["layout"] == baseline or (not baseline and r["tp_size"] * r["pp_size"] > 1)])
        dp = _tps([r for r in alike if r["layout"].startswith("dp") and r["layout"] == f"dp{r['gpus']}"])
        error = row["max_rel_error"] if row["dtype"] == "fp32" else row["rel_error"]
        judged.append(
            {
                **row,
                "mfu": row["mfu"] * row["peak_flops_per_gpu"] / peak,
                "peak_flops_per_gpu": peak,
                "vs_baseline": row["tps"] / base if base else None,
                "vs_dp": row["tps"] / dp if dp else None,
                "agrees": None
                if row["length"] in unchecked
                else bool(error is not None and error < TOLERANCE[row["dtype"]]),
            }
        )
    return judged


def document(plan: Plan, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """``rows``: a row a layout, at the workload's own length; ``sweep``: every length."""
    own = [row for row in rows if row["length"] == plan.first.workload.max_length]
    return {"config": plan.first.document(), "rows": own, "sweep": rows}


def disagreeing(rows: list[dict[str, Any]]) -> list[str]:
    """What, of judged rows, is not the unsharded model's result."""
    return [f"{row['layout']} at L = {row['length']}" for row in rows if row["agrees"] is False]


def _tps(rows: list[dict[str, Any]]) -> float | None:
    return max((r["tps"] for r in rows), default=None)
