"""The checkpoint that benchmarks run on: made from its config where it does not exist yet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ds_ring.cli.seeded_checkpoint import make_checkpoint
from ds_ring.config import RunConfig
from ds_ring.process import launcher
from ds_ring.process.keeper import scratch_folder


def source(run: RunConfig) -> Path:
    """The checkpoint directory; while it does not exist, the config in ds_configs/models/ that it is made from."""
    directory = Path(run.checkpoint)
    config = launcher.ROOT / "ds_configs" / "models" / f"{directory.name}.json"
    return directory if directory.is_dir() or not config.is_file() else config


def ensure(run: RunConfig, report: Callable[[str], None]) -> None:
    """Make the checkpoint where there is only its config. An interruption leaves no half-made one."""
    config, directory = source(run), Path(run.checkpoint)
    if config.is_dir():
        return
    report(f"make {directory} from {config}")
    device = "cuda" if launcher.gpu_count() else "cpu"
    directory.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(directory.parent) as scratch:
        made = scratch / directory.name
        make_checkpoint(config, made, seed=0, dtype=run.dtype, device=device)
        made.rename(directory)
