"""Several layouts on one model, one text and one batch, each in a launcher run of its own, one after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_ring import launcher
from ds_ring.checkpoints import make_checkpoint
from ds_ring.checks import check_run
from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError, DsRingError
from ds_ring.hf.shape import model_shape, read_config
from ds_ring.results import read_json

TOLERANCE = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 4e-2}
"""Largest relative error against the unsharded model that counts as the same computation."""

Report = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What will be run: layouts by file, all with the same model and workload."""

    runs: list[tuple[Path, RunConfig]]

    @classmethod
    def make(cls, files: Sequence[str], overrides: dict[str, Any]) -> Plan:
        """Load every layout and refuse, before anything runs, those that cannot work or do not compare.

        Raises:
            ConfigError: a broken rule (``check_run``), or layouts that differ in model, dtype or workload.
        """
        runs = [(Path(file), RunConfig.load(file, **overrides)) for file in files]
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


def run_all(
    plan: Plan, options: Sequence[str], logs: Path, advance: Callable[[], None], report: Report
) -> tuple[list[dict[str, Any]], list[str]]:
    """Run the reference and every layout.

    Args:
        options: passed on to launch/bench.py.
        logs: a folder for every run's log and each layout's own result.
        advance: called after the reference of each length and after each layout.

    Returns:
        Rows of all layouts and lengths, and what went wrong with layouts that have none: one that fails does not take
        the others' results with it.

    Raises:
        ConfigError: a run refused. DsRingError: there is no reference to compare with.
    """
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        references = []
        for length in plan.lengths:
            report(f"reference: the unsharded model, L = {length}")
            references.append(_reference(plan, length, Path(scratch), logs, report))
            advance()
        for file, layout in plan.runs:
            name, ranks = file.stem, layout.topology.world_size
            report(f"{name}: start {ranks} ranks")
            output = logs / f"{name}.json"
            output.unlink(missing_ok=True)  # an earlier run's result must not pass for this one's
            arguments = ["--config", str(file), *options, "--output", str(output), "--references", *references]
            try:
                launcher.launch("launch/bench.py", ranks, arguments, log=logs / f"{name}.log", report=report)
                if not output.exists():
                    raise DsRingError(f"the launcher ended without a result; see {logs / name}.log")
                rows += [{**row, "config_file": file.name} for row in read_json(output)["rows"]]
            except ConfigError:
                raise
            except DsRingError as error:
                report(f"{name} failed: {error}")
                failures.append(name)
            advance()
    return rows, failures


def _reference(plan: Plan, length: int, folder: Path, logs: Path, report: Report) -> str:
    run, output = plan.first, folder / f"reference_{length}.safetensors"
    arguments = ["--model", str(run.ring.model), "--dtype", run.dtype, "--output", str(output)]
    arguments += ["--rows", str(plan.parity_rows), "--length", str(length)]
    arguments += ["--text", *run.workload.text] if run.workload.text else []
    launcher.run_module("ds_ring.parity", arguments, log=logs / f"reference_{length}.log", report=report)
    return str(output)


def judge(rows: list[dict[str, Any]], baseline: str | None = None) -> list[dict[str, Any]]:
    """Add to each row, within its length and mode: ``vs_baseline`` and ``vs_dp`` (ratios of TPS), ``agrees``.

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
                "agrees": bool(error is not None and error < TOLERANCE[row["dtype"]]),
            }
        )
    return judged


def document(plan: Plan, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """``rows``: a row a layout, at the workload's own length; ``sweep``: every length."""
    own = [row for row in rows if row["length"] == plan.first.workload.max_length]
    return {"config": plan.first.document(), "rows": own, "sweep": rows}


def disagreeing(document: dict[str, Any]) -> list[str]:
    return [f"{row['layout']} at L = {row['length']}" for row in document["sweep"] if not row["agrees"]]


def _tps(rows: list[dict[str, Any]]) -> float | None:
    return max((r["tps"] for r in rows), default=None)
