"""Starting scripts with the ``deepspeed`` launcher, and not leaving anything behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ds_ring.errors import ConfigError, LaunchError, OutOfMemory

ROOT = Path(__file__).resolve().parents[2]
PROGRESS = "[ds_ring] "
FAILED = "failed on rank "
"""How a script begins the line that says what went wrong."""
OUT_OF_MEMORY = "out of memory on "
"""How a script begins the line that says so. The line counts, not the exit code: when a rank is out of memory its peers
fail in ways of their own, and which of them the launcher hears of first is chance."""
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
GRACE_S = 10.0
"""What a process that is late has left to end by itself."""


def gpu_count() -> int:
    """GPUs this process may use; 0 where ``DS_ACCELERATOR=cpu`` asks for CPUs."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


def launch(
    script: str,
    ranks: int,
    options: Sequence[str],
    *,
    log: Path,
    report: Callable[[str], None],
    limit_s: float = threading.TIMEOUT_MAX,
) -> None:
    """Run ``deepspeed script options`` to its end, a rank on each of the first ``ranks`` GPUs that are visible; its
    output goes to ``log``.

    Lines that the script says with ``cli.say`` are passed to ``report``. After ``limit_s`` seconds it is ended.

    Raises:
        ConfigError: the script refused (exit code 2), with what it said; or as ``where``. OutOfMemory: a rank's memory
            ran out. LaunchError: it failed, or took longer than ``limit_s``.
    """
    command = [deepspeed_command(), "--no_local_rank", "--master_port", str(free_port()), *where(ranks)]
    command += [str(ROOT / script), *options]
    run(command, ranks, log=log, report=report, limit_s=limit_s, unset=(VISIBLE_GPUS,))


def where(ranks: int) -> list[str]:
    """The launcher's options for ``ranks`` ranks of this host. It ignores ``CUDA_VISIBLE_DEVICES`` beside
    ``--num_gpus``, and would take GPUs that were left to others.

    Raises:
        ConfigError: it names GPUs by something else than numbers, or fewer than there are ranks.
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
    """Run ``python -m module options`` as one process; otherwise as ``launch``."""
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
) -> None:
    """Run any command that starts ``ranks`` ranks, in ``folder`` and without the variables ``unset``; otherwise as
    ``launch``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    refusals: list[str] = []
    shortages: list[str] = []
    failures: list[str] = []
    with log.open("w") as file:
        # A session of its own, so that everything it started can be ended with it.
        process = subprocess.Popen(
            command, env=_environment(ranks, unset), cwd=folder, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        with _ended(process, limit_s) as late:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                if line.startswith(PROGRESS):
                    report(line.removeprefix(PROGRESS).strip())
                elif line.startswith("error: "):
                    refusals.append(line.removeprefix("error: ").strip())
                elif line.startswith(OUT_OF_MEMORY):
                    shortages.append(line.strip())
                elif line.startswith(FAILED):
                    failures.append(line.removeprefix(FAILED).partition(": ")[2].strip())
            code = process.wait()
    if code == 2 or (code and refusals):
        raise ConfigError(refusals[0] if refusals else f"refused; see {log}")
    if code and shortages:
        raise OutOfMemory(shortages[0])
    program = Path(command[0]).name
    if late.is_set():
        raise LaunchError(f"{program} did not end in {limit_s:.0f} s; see {log}", f"took longer than {limit_s:.0f} s")
    if code:
        tail = "".join(log.read_text().splitlines(keepends=True)[-25:])
        reason = failures[0] if failures else f"exit code {code}"
        raise LaunchError(f"{program} ended with exit code {code}; the end of {log}:\n{tail}", reason)


@contextlib.contextmanager
def _ended(process: subprocess.Popen[str], limit_s: float) -> Iterator[threading.Event]:
    """Ends the process and all that it started, behind the block or when that takes longer than ``limit_s``; the event
    tells the latter. A process that is late is asked first, and may write down what it has."""
    late = threading.Event()

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def end_late() -> None:
        late.set()
        process.terminate()
        last_word.start()

    timer, last_word = threading.Timer(limit_s, end_late), threading.Timer(GRACE_S, end)
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()
        last_word.cancel()
        end()


def _environment(ranks: int, unset: Sequence[str]) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    if gpu_count() == 0:
        environment["DS_ACCELERATOR"] = "cpu"
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // ranks))
    return environment


def deepspeed_command() -> str:
    beside = Path(sys.executable).parent / "deepspeed"
    found = str(beside) if beside.exists() else shutil.which("deepspeed")
    if found is None:
        raise ConfigError("the deepspeed launcher is not installed; pip install -r requirements.txt")
    return found


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
