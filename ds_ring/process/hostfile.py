"""A hostfile that the launcher was told of and that is not there.

DeepSpeed's launcher goes on with this machine alone, with a warning that ``--quiet`` hides, and tells its ranks
nothing: what it was told they read from its command line, which Linux shows.
"""

from __future__ import annotations

import os
from pathlib import Path

from ds_ring.errors import ConfigError
from ds_ring.process.parent_watch import parent_of, words_of

LAUNCHERS = ("deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner")
"""Names of its command, the last behind ``python -m``."""


def check_hostfile() -> None:
    """Raise ConfigError, on all ranks alike, where the launcher above this rank was given a hostfile that it cannot
    have found. Says nothing of other launchers, nor on other systems than Linux."""
    parent = os.getppid()
    runner = parent_of(parent)
    if runner is None or "deepspeed.launcher.launch" not in words_of(parent):
        return
    try:
        folder = os.readlink(f"/proc/{runner}/cwd")
    except OSError:
        return
    given = hostfile_of(words_of(runner))
    if given is not None and not os.path.isfile(os.path.join(folder, given)):
        raise ConfigError(
            f"--hostfile {given} is no file in {folder}: the launcher went on with this machine alone; name one, or "
            f"leave --hostfile out"
        )


def hostfile_of(command: list[str]) -> str | None:
    """What the launcher's ``command`` gives as its hostfile, and not as the script's; None where it is another's."""
    start = next((i for i, word in enumerate(command) if i and Path(word).name in LAUNCHERS), len(command))
    options = command[start + 1 :]
    if not any(option.startswith(("-H", "--ho")) for option in options):
        return None
    # Which of them is the launcher's its own parser knows; it takes a while to import.
    from deepspeed.launcher.runner import DLTS_HOSTFILE, parse_args

    given: str = parse_args(options).hostfile
    return None if given == DLTS_HOSTFILE else given
