"""Scripts under the ``deepspeed`` launcher, and other commands. When one ends, everything that it started ends too."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ds_ring.errors import ConfigError, LaunchError, OutOfMemory
from ds_ring.process import network
from ds_ring.process.arguments import encode
from ds_ring.process.hostfile import Host, read_hostfile
from ds_ring.process.interruption import deferred
from ds_ring.process.keeper import Keeper
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
GRACE_S = 10.0
"""Time between asking a late process to end and killing it."""
LOOK_EVERY_S = 1.0

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
    limit_s: float = threading.TIMEOUT_MAX,
) -> None:
    """Run ``launch_command`` to its end.

    Args:
        log: the file for the script's output.
        report: called with each line that the script says with ``cli.options.say``.
        timeout_s: a process of the run that is stopped for longer ends it; 0: never.
        limit_s: seconds after which the script is ended.

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
    limit_s: float = threading.TIMEOUT_MAX,
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
    refusals: list[str] = []
    out_of_memory: list[str] = []
    failures: list[str] = []
    environment = environment_of(ranks, (*unset, VARIABLE)) | dict(extra)
    with (
        log.open("w", encoding="utf-8") as file,
        _started(command, environment, folder, limit_s, watch) as (process, end),
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            if line.startswith(PROGRESS):
                report(line.removeprefix(PROGRESS).strip())
            elif line.startswith("error: "):
                refusals.append(line.removeprefix("error: ").strip())
            elif line.startswith(OUT_OF_MEMORY):
                out_of_memory.append(line.strip())
            elif line.startswith(FAILED):
                failures.append(line.removeprefix(FAILED).partition(": ")[2].strip())
        code = process.wait()
    if code == 2 or (code and refusals):
        raise ConfigError(refusals[0] if refusals else f"refused; see {log}")
    if code and out_of_memory:
        raise OutOfMemory(out_of_memory[0])
    program = Path(command[0]).name
    if end.late:
        raise LaunchError(f"{program} did not end in {limit_s:.0f} s; see {log}", f"took longer than {limit_s:.0f} s")
    if end.why:
        raise LaunchError(f"{program} was ended: {end.why}; see {log}", end.why)
    if code:
        tail = "".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[-25:])
        reason = failures[0] if failures else f"exit code {code}"
        raise LaunchError(f"{program} ended with exit code {code}; the end of {log}:\n{tail}", reason)


@dataclass
class _End:
    """How a run was ended by us: because it took too long, or for the reason ``why``."""

    late: bool = False
    why: str = ""


@contextlib.contextmanager
def _started(
    command: list[str], environment: dict[str, str], folder: Path | None, limit_s: float, watch: Watch | None
) -> Iterator[tuple[subprocess.Popen[str], _End]]:
    """A process, which is killed with everything that it started at the end of the block, if this process ends, or
    after ``limit_s`` seconds.

    In the last case it first gets SIGTERM and ``GRACE_S`` seconds, in which it may write its results. With a watch it
    is killed, too, when that finds a reason; and what the process leaves behind when it ends, so that its output ends.
    """
    end, over = _End(), threading.Event()

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def end_late() -> None:
        end.late = True
        process.terminate()
        grace.start()

    def look() -> None:
        seen = watch(process.pid) if watch else lambda: ""
        while not over.wait(LOOK_EVERY_S):
            # Not reaped: its number, and so the group's, stays its own.
            try:
                gone = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            except ChildProcessError:  # it was waited for: its output has ended
                return
            end.why = end.why or seen()
            if gone or end.why:
                kill()
                return

    timer, grace = threading.Timer(limit_s, end_late), threading.Timer(GRACE_S, kill)
    looker = threading.Thread(target=look, daemon=True)
    with Keeper() as keeper, contextlib.ExitStack() as stack:
        with deferred():  # an interruption before the block that ends the process would leave it running
            # In a session of its own, so that all processes that it starts can be killed together.
            process = subprocess.Popen(
                command, env=environment, cwd=folder, encoding="utf-8", errors="backslashreplace",
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            stack.enter_context(keeper.group(process.pid))
            for ending in (kill, grace.cancel, timer.cancel, over.set):
                stack.callback(ending)
            timer.start()
            looker.start()
        yield process, end


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
