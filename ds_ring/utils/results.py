"""Result files: one JSON document of the form ``{…, "rows": [flat objects]}``, written completely or not at all."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ds_ring.utils import strict_json

PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "triton", "yunchang", "flash_attn")


def provenance() -> dict[str, Any]:
    """What a reader needs to repeat a result: date, command, commit and versions."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git": _git_revision(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect results."""
    return {"python": sys.version.split()[0], **{p: v for p in PACKAGES if (v := _version(p))}}


def write_atomically(path: str | Path, text: str) -> None:
    """Replace ``path`` in one step. After a full disk or an interruption the previous file is unchanged."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, document: dict[str, Any]) -> None:
    write_atomically(path, strict_json.dumps(document, indent=1) + "\n")


def collect(document: dict[str, Any], rows: Iterable[dict[str, Any]], output: str | Path | None) -> dict[str, Any]:
    """``document`` with ``rows``, written to ``output`` after every row.

    So earlier rows are kept where a later one runs out of memory, or the command is interrupted."""
    document = {**document, "rows": (found := list[dict[str, Any]]())}
    for row in rows:
        found.append(row)
        if output is not None:
            write_json(output, document)
    return document


def read_json(path: str | Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(Path(path).read_text())
    return document


def _git_revision() -> str | None:
    """The commit of this code. ``DS_RING_REVISION`` overrides it, for copies without a git history."""
    if named := os.environ.get("DS_RING_REVISION"):
        return named
    root = Path(__file__).parents[2]
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
