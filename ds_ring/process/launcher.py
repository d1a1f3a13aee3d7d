"""Scripts under the ``deepspeed`` launcher, and other commands. When one ends, everything that it started ends too."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO

from ds_ring.errors import ConfigError, LaunchError, OutOfMemory
from ds_ring.process import network
from ds_ring.process.arguments import encode
from ds_ring.process.child import started
from ds_ring.process.hostfile import Host, read_hostfile
from ds_ring.process.outcome import VARIABLE, Outcomes
from ds_ring.process.run_watch import RunWatch

ROOT = Path(__file__).resolve().parents[2]
PROGRESS = "[ds_ring] "
"""Prefix of a script's lines of progress."""
FAILED = "failed on rank "
"""Prefix of the line in which a script says what went wrong."""
OUT_OF_MEMORY = "out of memory on "
"""Prefix of the line in which a script says that memory ran out. The line counts, not the exit code: when one rank runs
out of memory, the others fail with errors of their own, and any of these may reach the launcher first."""
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
KEEP_ALIVE = "-oBatchMode=yes -oConnectTimeout=20 -oServerAliveInterval=3 -oServerAliveCountMax=3"

Watch = Callable[[int], Callable[[], str]]


def gpu_count() -> int:
    """The number of GPUs that this process may use; 0 where ``DS_ACCELERATOR=cpu`` asks for CPUs."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


def launch_command(module: str, ranks: int, port: int, options: Sequence[str]) -> list[str]:
    """``deepspeed … MODULE options``, one rank on each of the first ``ranks`` visible GPUs. Ranks meet at
    ``port``.

    Raises:
        ConfigError: as ``gpu_options``, or the launcher is not installed.
    """
    launcher = [deepspeed_command(), "--quiet", "--no_local_rank", "--master_port", str(port), *gpu_options(ranks)]
    return [*launcher, "--module", "ds_ring.cli.launched", module, *options]


def check_hosts(hostfile: str) -> list[Host]:
    """The hosts of a hostfile, of which this must be the first.

    Raises:
        ConfigError: the hostfile is not one, another host is the first, or pdsh is not installed.
    """
    hosts = read_hostfile(hostfile)
    if not network.is_this_host(hosts[0].name):
        raise ConfigError(
            f"{hosts[0].name}, the first host of {hostfile}, is another one; start there, where rank 0 runs"
        )
    if shutil.which("pdsh") is None:
        raise ConfigError("pdsh, by which DeepSpeed's launcher starts other hosts, is not installed")
    return hosts


def hosts_command(
    module: str, hostfile: str, port: int, options: Sequence[str], environment: Mapping[str, str]
) -> list[str]:
    """As ``launch_command``, on every slot of a hostfile's hosts.

    Options travel as letters that no shell evaluates, with the variables of ``environment`` that ranks need.
    """
    # -N: lines as they are, without the host's name in front; -b: an interrupt ends pdsh at once.
    launcher = [deepspeed_command(), "--quiet", "--no_local_rank", "--master_port", str(port), "--hostfile", hostfile]
    letters = encode(module, options, environment)
    return [*launcher, "--launcher_args", "-N -b", "--module", "ds_ring.cli.encoded", letters]


def hosts_environment(ranks: int) -> dict[str, str]:
    """The environment of ``hosts_command``: ssh gives up on a host that does not answer, and asks for no password.

    ``ranks``: how many this host starts.
    """
    environment = environment_of(ranks, (VISIBLE_GPUS,))
    given = environment.get("PDSH_SSH_ARGS_APPEND", "")
    environment["PDSH_SSH_ARGS_APPEND"] = f"{given} {KEEP_ALIVE}".strip()
    return environment


def launch(
    module: str,
    ranks: int,
    options: Sequence[str],
    *,
    log: Path,
    report: Callable[[str], None],
    timeout_s: float = 0.0,
    limit_s: float = math.inf,
) -> None:
    """Run ``launch_command`` to its end.

    Args:
        log: the file for the script's output.
        report: called with each line that the script says with ``cli.options.say``.
        timeout_s: a process of the run that is stopped for longer ends it; 0: never.
        limit_s: seconds after which the script is ended; it has some in which it may write what it has.

    Raises:
        ConfigError: the script refused (exit code 2), with its message; or as ``gpu_options``. OutOfMemory: a rank's
            memory ran out. LaunchError: the script failed, did not get to its end, or took longer than ``limit_s``.
    """
    with reserved_port() as port, Outcomes() as outcomes:
        command = launch_command(module, ranks, port, options)
        run(
            command, ranks, log=log, report=report, limit_s=limit_s, unset=(VISIBLE_GPUS,), extra=outcomes.environment,
            watch=lambda session: RunWatch(session, outcomes, timeout_s).reason_to_end,
        )  # fmt: skip
        if outcomes.completed() is None:
            raise LaunchError(f"{command[0]} ended without a result; see {log}", "a process of the run was killed")


def gpu_options(ranks: int) -> list[str]:
    """The launcher's options for ``ranks`` ranks on the visible GPUs of this host.

    With ``--num_gpus`` alone the launcher ignores ``CUDA_VISIBLE_DEVICES`` and takes the host's first GPUs.

    Raises:
        ConfigError: ``CUDA_VISIBLE_DEVICES`` names GPUs otherwise than by number, or fewer GPUs than there are ranks.
    """
    visible = os.environ.get(VISIBLE_GPUS, "")
    if not visible or gpu_count() == 0:
        return ["--num_gpus", str(ranks)]
    gpus = [name.strip() for name in visible.split(",")]
    if not all(name.isdecimal() for name in gpus):
        raise ConfigError(f"{VISIBLE_GPUS}={visible}: the deepspeed launcher takes GPUs by number only")
    if len(gpus) < ranks:
        raise ConfigError(f"{VISIBLE_GPUS}={visible} leaves {len(gpus)} GPUs to {ranks} ranks")
    return ["--include", "localhost:" + ",".join(gpus[:ranks])]


def run_module(module: str, options: Sequence[str], *, log: Path, report: Callable[[str], None]) -> None:
    """As ``launch``, for ``python -m module options`` in one process."""
    run([sys.executable, "-m", module, *options], 1, log=log, report=report)


def run(
    command: list[str],
    ranks: int,
    *,
    log: Path,
    report: Callable[[str], None],
    limit_s: float = math.inf,
    folder: Path | None = None,
    unset: Sequence[str] = (),
    extra: Mapping[str, str] = MappingProxyType({}),
    watch: Watch | None = None,
) -> None:
    """As ``launch``, for any command that starts ``ranks`` ranks, and judged by its exit code.

    Args:
        folder: working directory of the command.
        unset: environment variables that the command does not get.
        extra: those that it gets beside this process's.
        watch: makes of the process's number a function that says why it is to be ended; it is asked every second.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = environment_of(ranks, (*unset, VARIABLE)) | dict(extra)
    with log.open("wb") as file, log.open("rb") as written:
        said = _Said(written, report)
        with started(
            command, environment, folder=folder, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        ) as child:
            seen = watch(child.process.pid) if watch else lambda: ""
            why = child.wait(seen, said.read, limit_s)
        said.read()
    code = child.process.returncode
    if code == 2 or (code and said.refusals):
        raise ConfigError(said.refusals[0] if said.refusals else f"refused; see {log}")
    if code and said.out_of_memory:
        raise OutOfMemory(said.out_of_memory[0])
    program = Path(command[0]).name
    if why:
        raise LaunchError(f"{program} was ended: {why}; see {log}", why)
    if code:
        tail = "".join(_text(log.read_bytes()).splitlines(keepends=True)[-25:])
        reason = said.failures[0] if said.failures else f"exit code {code}"
        raise LaunchError(f"{program} ended with exit code {code}; the end of {log}:\n{tail}", reason)


class _Said:
    """What a script has said so far, by the beginnings of its lines; ``file`` is its output."""

    def __init__(self, file: IO[bytes], report: Callable[[str], None]) -> None:
        self.refusals: list[str] = []
        self.out_of_memory: list[str] = []
        self.failures: list[str] = []
        self._file, self._report, self._begun = file, report, b""

    def read(self) -> None:
        """Read what has been said since the last call, whole lines."""
        *lines, self._begun = re.split(rb"[\r\n]", self._begun + self._file.read())
        for line in map(_text, lines):
            if line.startswith(PROGRESS):
                self._report(line.removeprefix(PROGRESS).strip())
            elif line.startswith("error: "):
                self.refusals.append(line.removeprefix("error: ").strip())
            elif line.startswith(OUT_OF_MEMORY):
                self.out_of_memory.append(line.strip())
            elif line.startswith(FAILED):
                self.failures.append(line.removeprefix(FAILED).partition(": ")[2].strip())


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="backslashreplace")


def environment_of(ranks: int, unset: Sequence[str]) -> dict[str, str]:
    """The environment of ``ranks`` launched ranks: this process's, with this package and interpreter on the paths."""
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    if gpu_count() == 0:
        environment["DS_ACCELERATOR"] = "cpu"
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    return environment


def deepspeed_command() -> str:
    beside = Path(sys.executable).parent / "deepspeed"
    found = str(beside) if beside.exists() else shutil.which("deepspeed")
    if found is None:
        raise ConfigError("the deepspeed launcher is not installed; pip install -r requirements.txt")
    return found


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port of this host on which nothing listens, and which no other process is given during the block.

    The system never gives the port of a bound socket to a process that asks for any port. A process that asks for it by
    number gets it if it sets SO_REUSEADDR, as PyTorch's store does.
    """
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        yield holder.getsockname()[1]
