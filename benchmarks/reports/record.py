"""Makes the records that the page lacks, as far as this machine's GPUs and the time allow."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from glob import glob
from pathlib import Path

from benchmarks.reports.manifest import Page, Source
from benchmarks.reports.page import MANIFEST, RESULTS
from ds_ring.errors import ConfigError, DsRingError, LaunchError
from ds_ring.process.launcher import VISIBLE_GPUS, gpu_options, run
from ds_ring.utils.output_file import partial_of, write_atomically
from ds_ring.utils.results import read_json


def gpus_of(command: str) -> int:
    """The number of GPUs that a command uses, by its options or the folder of its configurations."""
    found = re.search(r"--(?:num_)?gpus (\d+)|ds_configs/gpu(\d+)/", command)
    return int(found.group(1) or found.group(2)) if found else 1


def sources_to_make(page: Page, names: Sequence[str], recorded: set[str]) -> list[Source]:
    """The sources of the files ``names``. Without names: of all files that are not recorded.

    Raises:
        ConfigError: a name that the page does not know, or a file that no command makes.
    """
    sources = {source.file: source for section in page.sections for source in section.sources}
    if unknown := [name for name in names if name not in sources]:
        raise ConfigError(f"{MANIFEST} has no record {', '.join(unknown)}; it has {', '.join(sources)}")
    if unmade := [name for name in names if sources[name].command is None]:
        raise ConfigError(f"no command makes {', '.join(unmade)} yet")
    return [
        source
        for name, source in sources.items()
        if source.command and (name in names if names else name not in recorded)
    ]


def record(
    root: Path, names: Sequence[str], limit_s: float, gpus: int, say: Callable[[str], None]
) -> dict[str, dict[str, str]]:
    """Run the commands of the records ``names``, or of all missing records, one by one, and keep their results.

    Commands for which there are too few GPUs, or no time is left, are left out. When a command runs out of time, what
    it has found by then is beside where its result would be, and no record.

    Returns:
        ``{"recorded": {file: command}, "left_out": {file: why}}``.
    """
    page, started = Page.load(root / MANIFEST), time.monotonic()
    recorded: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for source in sources_to_make(page, names, {file.name for file in (root / RESULTS).glob("*.json")}):
        assert source.command is not None
        left, needed = limit_s - (time.monotonic() - started), gpus_of(source.command)
        if needed > gpus:
            left_out[source.file] = f"needs {needed} GPUs"
        elif left <= 0:
            left_out[source.file] = "no time left"
        else:
            say(f"{source.file}: {source.command}")
            reason = _make(root, page, source, left, say)
            if reason is None:
                recorded[source.file] = source.command
            else:
                left_out[source.file] = reason
    return {"recorded": recorded, "left_out": left_out}


def _make(root: Path, page: Page, source: Source, left_s: float, say: Callable[[str], None]) -> str | None:
    """Run a source's command. Returns why nothing, or not all, was recorded; None: it was."""
    made, recorded = root / "results" / source.file, root / RESULTS / source.file
    for earlier in (made, partial_of(made)):
        earlier.unlink(missing_ok=True)
    before, log, ends = made.with_suffix(".before.log"), made.with_suffix(".log"), time.monotonic() + left_s
    assert source.command is not None
    try:
        for command in [*_preparations(root, page, source.command), source.command]:
            file = log if command == source.command else before
            left_s = ends - time.monotonic()
            words = _words(root, command)
            unset = (VISIBLE_GPUS,) if "--include" in words else ()
            run(words, gpus_of(command), log=file, report=say, limit_s=left_s, folder=root, unset=unset)
    except LaunchError as error:
        how = f"did not end in {left_s:.0f} s" if time.monotonic() >= ends else f"ended with {error.reason}"
        reason = f"{how}; see {file.relative_to(root)}"
        had = partial_of(made)
        return reason + (f"; what it had by then is in {had.relative_to(root)}" if had.is_file() else "")
    except DsRingError as error:
        return str(error)
    if not made.is_file():
        return f"gave no {made.relative_to(root)}"
    try:
        read_json(made)
    except (ConfigError, ValueError) as error:  # partial, or not JSON
        return str(error)
    write_atomically(recorded, made.read_bytes())
    return None


def _preparations(root: Path, page: Page, command: str) -> list[str]:
    return [
        one.command
        for one in page.preparations
        if any(word in command for word in one.wanted_by) and not (root / one.makes).exists()
    ]


def _words(root: Path, command: str) -> list[str]:
    """The words of a command, with patterns replaced by the file names that match, and ``python`` by this interpreter.

    The deepspeed launcher gets the visible GPUs."""
    words: list[str] = []
    for word in shlex.split(command):
        words += sorted(glob(word, root_dir=root)) or [word]
    if words[0] == "deepspeed" and "--num_gpus" in words:
        at = words.index("--num_gpus")
        words[at : at + 2] = gpu_options(int(words[at + 1]))
    return [sys.executable, *words[1:]] if words[0] == "python" else words
