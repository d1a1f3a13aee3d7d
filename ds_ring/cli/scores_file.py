"""The file of ``--scores``: a JSON line for each document, appended as documents finish, in input order at the end.

A line says of which job it is: the same documents, model, layout and options. So ``--resume`` goes on where a run was
cut, by the lines that are there, and gives the file that an undisturbed run gives.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_ring.errors import InputError, OutputError
from ds_ring.utils import strict_json
from ds_ring.utils.output_file import write_parts_atomically

KEPT = ("tokens", "scored", "log_likelihood", "too_long")
"""What totals are made of."""


def check_free(path: str, resume: bool) -> None:
    """Raise InputError where ``path`` cannot be appended to, or holds something and is not to be resumed."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"--scores {path} is no regular file, which is needed to put lines in order and to resume")
    if not resume and os.path.isfile(path) and os.path.getsize(path):
        raise InputError(f"--scores {path} is there already: --resume goes on with it; else name another file")


@dataclass(frozen=True)
class _Place:
    """Of a line in the file, and what totals need of it."""

    start: int
    size: int
    kept: dict[str, Any]


class ScoresFile:
    """On rank 0.

    Attributes:
        done: indices of the documents that have a line.
    """

    def __init__(self, path: str, job: str, ids: Sequence[str | int], resume: bool) -> None:
        """Take what is there, without a line that was cut.

        Args:
            job: equal for runs whose lines may stand in one file.
            ids: of all documents, by index.

        Raises:
            InputError: lines of another job, or that are none of this command's; another run writes the file.
            OutputError: it cannot be written.
        """
        check_free(path, resume)
        self._path, self._job, self._ids = path, job, ids
        self._places = dict[int, _Place]()
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  # for as long as this object
        except OSError as error:
            raise OutputError(f"{path} could not be written: {error.strerror}") from None
        self._lock()
        self._end = self._take_lines()
        self._file.truncate(self._end)

    def _lock(self) -> None:
        """Until the file is closed, or this process ends: lines of two runs would not stand where each has noted."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise InputError(f"--scores {self._path} is written by another run; wait for its end") from None
        except OSError:  # a file system without locks
            return

    @property
    def done(self) -> set[int]:
        return set(self._places)

    def append(self, entries: Iterable[dict[str, Any]]) -> None:
        """Lines of documents that have none yet; each entry has an ``index``."""
        for entry in entries:
            if entry["index"] not in self._places:
                line = strict_json.dumps({**entry, "job": self._job}).encode() + b"\n"
                self._write(line)
                self._add(entry, len(line))

    def finish(self) -> dict[str, Any]:
        """Put the lines in the order of the documents. Returns totals over those that are not too long:
        ``{documents, too_long, tokens, scored, log_likelihood}``."""
        assert len(self._places) == len(self._ids)
        places = [self._places[index] for index in range(len(self._ids))]
        write_parts_atomically(self._path, self._lines(places))
        self._file.close()
        kept = [place.kept for place in places]
        whole = [entry for entry in kept if entry["too_long"] is None]
        sums = {name: sum(entry[name] for entry in whole) for name in ("tokens", "scored")}
        total = math.fsum(entry["log_likelihood"] for entry in whole)
        return {"documents": len(kept), "too_long": len(kept) - len(whole), **sums, "log_likelihood": total}

    def _lines(self, places: Sequence[_Place]) -> Iterator[bytes]:
        for place in places:
            yield os.pread(self._file.fileno(), place.size, place.start)

    def _take_lines(self) -> int:
        """Read the lines that are there; where the last whole one ends."""
        self._end = 0
        self._file.seek(0)
        with open(self._file.fileno(), "rb", closefd=False) as lines:  # the one that is locked
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break  # the run was cut here
                self._add(self._checked(line, number), len(line))
        return self._end

    def _checked(self, line: bytes, number: int) -> dict[str, Any]:
        where = f"--scores {self._path} line {number}"
        try:
            entry = json.loads(line)
            index, job = entry["index"], entry["job"]
            known = type(index) is int and 0 <= index < len(self._ids) and all(name in entry for name in KEPT)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(f"{where} is no line of this command's; name another file") from None
        if job != self._job:
            raise InputError(
                f"{where} is of another job: other documents, another model, layout, dtype or other options; run it as "
                f"it was begun, or name another file"
            )
        if not known or index in self._places or entry.get("id") != self._ids[index]:
            raise InputError(f"{where} is no line of this command's; name another file")
        return entry

    def _add(self, entry: dict[str, Any], size: int) -> None:
        self._places[entry["index"]] = _Place(self._end, size, {name: entry[name] for name in KEPT})
        self._end += size

    def _write(self, line: bytes) -> None:
        try:
            view = memoryview(line)
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            raise OutputError(f"{self._path} could not be written: {error.strerror}; --resume goes on") from None
