"""Result files: one JSON document of the form ``{…, "rows": [flat objects], "status": "complete"}``.

``"status"`` is ``"complete"`` in every result of a command that got to its end. What a command has before is in a file
of its own, beside the result of an earlier run, and says ``"partial"``.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ds_ring.errors import ConfigError, OutputError
from ds_ring.utils import strict_json
from ds_ring.utils.output_file import is_special, partial_of, write_atomically

log = logging.getLogger("ds_ring")

COMPLETE, PARTIAL = "complete", "partial"

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


def write_json(path: str | Path, document: dict[str, Any]) -> None:
    write_atomically(path, strict_json.dumps(document, indent=1) + "\n")


def collect(document: dict[str, Any], rows: Iterable[dict[str, Any]], output: str | Path | None) -> dict[str, Any]:
    """``document`` with ``rows``, written to ``output`` when it is complete.

    While it is not, the rows so far are in ``partial_of(output)``, written after every row: they are kept where a later
    one runs out of memory, or the command is interrupted, and so is the result of an earlier run. Where ``output``
    cannot be written the document is returned all the same; ``cli.options.main`` tries again and says so. It alone
    writes into what is no regular file, whose reader gets one document.
    """
    document = {**document, "rows": (found := list[dict[str, Any]]())}
    for row in rows:
        found.append(row)
        if output is not None:
            write_partial(output, document)
    with suppress(OutputError):
        if found and output is not None and not is_special(output):
            return write_complete(output, document)
    return {**document, "status": COMPLETE}


def write_partial(output: str | Path, document: dict[str, Any]) -> None:
    """Keep what there is of a result beside ``output``, marked as partial. Nothing, where that is no regular file."""
    if is_special(output):
        return
    try:
        write_json(partial_of(output), {**document, "status": PARTIAL})
    except OutputError as error:  # what is computed meanwhile may still find room in the end
        log.warning("rows so far are not kept: %s", error)


def write_complete(output: str | Path | None, document: dict[str, Any]) -> dict[str, Any]:
    """``document`` marked as complete, in ``output`` where that is given; what was kept beside it is removed."""
    document = {**document, "status": COMPLETE}
    if output is not None:
        write_json(output, document)
        if not is_special(output):
            partial_of(output).unlink(missing_ok=True)
    return document


def read_json(path: str | Path, *, partial: bool = False) -> dict[str, Any]:
    """A result file. Files of earlier versions do not say whether they are complete, and are.

    Raises:
        ConfigError: a partial result, without ``partial``. OSError, ValueError: no file, or not JSON.
    """
    document: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    if not partial and document.get("status", COMPLETE) != COMPLETE:
        raise ConfigError(f"{path} is a partial result: the command that wrote it did not get to its end")
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
