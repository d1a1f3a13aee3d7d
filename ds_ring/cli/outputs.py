"""Where a command writes, looked at before any work: nothing that it reads is overwritten, and what cannot be written
is said at once."""

from __future__ import annotations

import argparse
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ds_ring.errors import InputError
from ds_ring.utils.output_file import check_writable, is_special, partial_of, remove_unfinished

WRITTEN = ("output", "trace", "markdown", "scores")
"""Options that name files which a command writes; ``--then CONFIG OUTPUT`` names one as well."""
NO_FILES = ("prompt", *WRITTEN, "then")


def check(args: argparse.Namespace, beside: Iterable[str] = ()) -> None:
    """Raise InputError for an output that cannot be written, or that is what another option names.

    Args:
        beside: suffixes of files that are written beside ``--output``, such as ``.md``. Then it must be a file.
    """
    outputs = list(_outputs(args))
    for option, output in outputs:
        _check_file(option, output)
    for option, output in [*outputs]:
        if option == "--output" and beside:
            outputs += _beside(output, beside)
    paths = [os.path.realpath(output) for _, output in outputs if not is_special(output)]
    if twice := next((path for i, path in enumerate(paths) if path in paths[:i]), None):
        raise InputError(f"{twice} would be written twice; give each output a name of its own")
    for name, value in vars(args).items():
        if name not in NO_FILES:
            for text in _texts(value):
                _check_apart(outputs, text, f"--{name.replace('_', '-')}")
    for config, _ in getattr(args, "then", None) or []:
        _check_apart(outputs, config, "--then")


def check_apart(args: argparse.Namespace, read: Iterable[str | None]) -> None:
    """Raise InputError for an output that is one of the files ``read``, or lies in a folder of them."""
    outputs = list(_outputs(args))
    for path in read:
        if path is not None:
            _check_apart(outputs, path, "the configuration")


def remove_unwritten(args: argparse.Namespace) -> None:
    """Remove the files beside the outputs that killed processes have left half-written."""
    for _, output in _outputs(args):
        if not is_special(output):
            remove_unfinished(output)


def remove_partial(args: argparse.Namespace) -> None:
    """Remove what an earlier run that did not get to its end has left beside the outputs."""
    remove_unwritten(args)
    for option, output in _outputs(args):
        if option in ("--output", "--then") and not is_special(output):
            with suppress(OSError):
                partial_of(output).unlink(missing_ok=True)


def partial(args: argparse.Namespace | None) -> list[str]:
    """Files with the rows of this run so far."""
    outputs = [] if args is None else [output for option, output in _outputs(args) if option in ("--output", "--then")]
    return [str(file) for output in outputs if os.path.isfile(file := partial_of(output))]


def resumable(args: argparse.Namespace | None) -> str | None:
    """The file of ``--scores``, where it holds something."""
    scores = getattr(args, "scores", None)
    return str(scores) if scores is not None and os.path.isfile(scores) and os.path.getsize(scores) else None


def _outputs(args: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    for name in WRITTEN:
        value = getattr(args, name, None)
        if value is None or (name == "markdown" and not args.table):
            continue
        for path in [value] if isinstance(value, str) else value:
            yield f"--{name}", Path(path)
    for _, output in getattr(args, "then", None) or []:
        yield "--then", Path(output)


def _check_file(option: str, output: Path) -> None:
    try:
        check_writable(output)
    except OSError as error:
        raise InputError(f"{option} {output} cannot be written: {error.strerror}") from None
    with suppress(OSError):
        found, printed = os.stat(output), os.fstat(1)
        if stat.S_ISREG(found.st_mode) and os.path.samestat(found, printed):
            raise InputError(f"{option} {output} is standard output, which gets the result anyway; leave it out")


def _beside(output: Path, suffixes: Iterable[str]) -> Iterator[tuple[str, Path]]:
    if is_special(output):
        raise InputError(f"--output {output} is no file: {', '.join(suffixes)} are written beside it; name one")
    for suffix in suffixes:
        file = output.with_suffix(suffix)
        if suffix == ".logs":
            if file.exists() and not file.is_dir():
                raise InputError(f"--output {output}: its logs go to the folder {file}, which is a file")
        else:
            _check_file("--output: beside it", file)
        yield "--output", file


def _check_apart(outputs: list[tuple[str, Path]], read: str, what: str) -> None:
    for option, output in outputs:
        if is_special(output):
            continue
        if os.path.isdir(read):
            within = os.path.dirname(os.path.realpath(output)) == os.path.realpath(read)
            if within and what in ("--model", "--directory", "the configuration"):
                raise InputError(f"{option} {output} lies in the checkpoint {read} ({what}); name another folder")
        elif _same(output, read):
            raise InputError(f"{option} {output} is what {what} names, {read}: it would be overwritten; name another")


def _same(output: Path, read: str) -> bool:
    try:
        return os.path.isfile(read) and os.path.samefile(output, read)
    except (OSError, ValueError):
        return False


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
