"""DeepSpeed's hostfile: its lines, and whether the one that the launcher was given exists.

Where the hostfile is missing, DeepSpeed's launcher goes on with this machine alone. It says so in a warning that
``--quiet`` hides, and passes nothing about it to its ranks. They read the name from the launcher's command line, which
Linux shows.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ds_ring.errors import ConfigError
from ds_ring.process.processes import command_of, parent_of

LAUNCHERS = ("deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner")
"""Names of the launcher's command; the last is for ``python -m``."""

MOST_SLOTS = 1024


@dataclass(frozen=True)
class Host:
    """A line of a hostfile."""

    name: str
    slots: int


def read_hostfile(path: str) -> list[Host]:
    """The hosts of a hostfile.

    Raises:
        ConfigError: a file that cannot be read, a line that the launcher would not understand, no host, or one twice.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; the launcher would use this machine alone") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not text; a hostfile has a line NAME slots=N for each host") from None
    hosts = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not words[1].startswith("slots=") or not words[1][6:].isdecimal():
            raise ConfigError(f'{path}, line {number}: "{line.strip()}" is not NAME slots=N')
        if not 1 <= int(words[1][6:]) <= MOST_SLOTS:
            raise ConfigError(f"{path}, line {number}: {words[1]} must be at least 1 and at most {MOST_SLOTS}")
        hosts.append(Host(words[0], int(words[1][6:])))
    if not hosts:
        raise ConfigError(f"{path} names no host")
    if len({host.name for host in hosts}) < len(hosts):
        raise ConfigError(f"{path} names a host twice")
    return hosts


def check_hostfile() -> None:
    """Raise ConfigError, on all ranks alike, where the launcher of this rank was given a hostfile that does not exist.

    Does nothing under other launchers, and on other systems than Linux.
    """
    parent = os.getppid()
    runner = parent_of(parent)
    if runner is None or "deepspeed.launcher.launch" not in command_of(parent):
        return
    try:
        folder = os.readlink(f"/proc/{runner}/cwd")
    except OSError:
        return
    given = hostfile_of(command_of(runner))
    if given is not None and not os.path.isfile(os.path.join(folder, given)):
        raise ConfigError(
            f"--hostfile {given} is no file in {folder}: the launcher went on with this machine alone; name one, or "
            f"leave --hostfile out"
        )


def hostfile_of(command: list[str]) -> str | None:
    """The hostfile in the launcher's ``command``, not one among the script's own options; None where there is none."""
    start = next((i for i, word in enumerate(command) if i and Path(word).name in LAUNCHERS), len(command))
    options = command[start + 1 :]
    if not any(option.startswith(("-H", "--ho")) for option in options):
        return None
    # Only DeepSpeed's own parser can tell the launcher's options from the script's. Importing it takes a while.
    from deepspeed.launcher.runner import DLTS_HOSTFILE, parse_args

    given: str = parse_args(options).hostfile
    return None if given == DLTS_HOSTFILE else given
