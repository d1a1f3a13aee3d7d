"""What ranks tell the command that launched them: how each ended, and the result.

DeepSpeed's launcher returns 0 when one of its processes died by a signal, and one rank's failure makes others fail in
other ways. So a command of ours that launches ranks takes nothing from the launcher's exit code: it goes by what ranks
write into a file of the command's own, which has no name and is gone with it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from ds_ring.utils import strict_json

VARIABLE = "DS_RING_OUTCOME"
"""Names the file to ranks of this host. Not set: the ranks were started by another launcher, or by none."""
NAME = "ds_ring outcomes"
"""What the system calls the file."""
DONE, OURS, USERS, NO_MEMORY, NO_OUTPUT, NO_STDOUT = range(6)
"""Exit codes; what they mean is in ``cli/options.py``."""
RANKED = (NO_MEMORY, USERS, NO_OUTPUT, NO_STDOUT)
"""Exit codes that say more than others, the most telling first."""


def is_supervised() -> bool:
    """Whether the command that launched this process prints the result."""
    return VARIABLE in os.environ


def tell(code: int, result: str | None = None) -> None:
    """Say how this rank ends: the exit code and, on rank 0, the result, one JSON document.

    Raises:
        OSError: the command is gone.
    """
    if not is_supervised():
        return
    # On another host, which got the variable as well, the path may lead to a file of somebody else's.
    if os.readlink(os.environ[VARIABLE]).removesuffix(" (deleted)") != f"/memfd:{NAME}":
        return
    line = strict_json.dumps({"rank": int(os.environ.get("RANK", "0")), "code": code, "result": result}) + "\n"
    descriptor = os.open(os.environ[VARIABLE], os.O_WRONLY | os.O_APPEND)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Told:
    """What one rank told; ``result`` is the text of a JSON document."""

    rank: int
    code: int
    result: str | None


class Outcomes:
    """The file, on the side of the command that launches; a context manager."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create(NAME)

    def __enter__(self) -> Outcomes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._descriptor)

    @property
    def environment(self) -> dict[str, str]:
        return {VARIABLE: f"/proc/{os.getpid()}/fd/{self._descriptor}"}

    def told(self) -> list[Told]:
        data = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)
        found: list[dict[str, Any]] = [
            json.loads(line) for line in data.splitlines(keepends=True) if line[-1:] == b"\n"
        ]
        return [Told(**each) for each in found]

    def completed(self) -> Told | None:
        """What rank 0 told where it got to its end."""
        return next((told for told in self.told() if told.rank == 0 and told.code in (DONE, NO_OUTPUT)), None)

    def failed(self) -> int | None:
        """The most telling exit code of a rank that failed; None where none told of a failure."""
        codes = [told.code for told in self.told() if told.code]
        return next((code for code in RANKED if code in codes), codes[0] if codes else None)
