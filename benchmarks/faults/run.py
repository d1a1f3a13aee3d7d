"""One trial: a run on hosts that this machine plays, the signal, and what is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.faults.plan import Command, Target, Trial
from ds_ring.process.launcher import ROOT
from ds_ring.process.processes import command_of, rank_of
from ds_ring.testing.local_hosts import LocalHosts
from ds_ring.utils import strict_json
from ds_ring.utils.output_file import UNFINISHED

RANKS = 2
START_S = 180.0
LOADING_S, RUNNING_S, WRITING_S = 6.0, 3.0, 0.03
"""Over which time after a phase began the signals of its trials are spread."""
BEYOND_S = 10.0
"""After ``timeout_s`` and so many seconds nothing may be left."""
LATE_S = 60.0
"""How much longer a trial looks for the end of what was left."""
RUNNING = ("[ds_ring] fused",)
"""A line that says that the model is loaded."""


@dataclass(frozen=True)
class Inputs:
    """What every run of a trial works on.

    Attributes:
        connect_s: what a rank that still reads its packages may take until it connects, from where its time-out counts.
        reference: by command what an undisturbed run writes, without what differs from run to run.
    """

    checkpoint: Path
    text: Path
    timeout_s: int
    connect_s: int
    reference: dict[str, Any]


def command_line(command: Command, hosts: LocalHosts, inputs: Inputs, output: Path) -> list[str]:
    """The words of a run of two ranks that writes ``output``."""
    what, script = command.split()
    limits = ["--timeout-s", inputs.timeout_s, "--set", f"start_timeout_s={inputs.timeout_s}"]
    options = ["--model", inputs.checkpoint, "--ring-degree", RANKS, "--dtype", "fp32", "--max-length", 4000]
    options += ["--output", output, *limits]
    options += ["--text", *[inputs.text] * 6] if script == "score" else ["--max-length", 300, "--repeats", 20]
    several = len(hosts.names) > 1
    if what == "ds-ring":
        where = ["--hostfile", hosts.hostfile] if several else ["--ranks", RANKS]
        words: list[object] = [sys.executable, "-m", "ds_ring", script, *options, *where]
    else:
        where = ["--hostfile", hosts.hostfile] if several else ["--num_gpus", RANKS]
        launcher = Path(sys.executable).parent / "deepspeed"
        words = [launcher, "--quiet", "--no_local_rank", *where, f"launch/{script}.py", *options]
    return [str(word) for word in words]


def environment() -> dict[str, str]:
    return os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def role_of(pid: int) -> Target | None:
    """Which part a process has in a run; None: none that a trial aims at."""
    command = command_of(pid)
    words, program = set(command[:6]), Path(command[0]).name if command else ""
    if program == "pdsh":
        return "pdsh"
    if program in ("ssh", "sshd", "bash", "sh") or not command or any(word.endswith("guard.py") for word in words):
        return None
    if "deepspeed.launcher.launch" in words:
        return "launch"
    if any(Path(word).name == "deepspeed" for word in command[:2]):
        return "runner"
    if rank_of(pid) is not None and "multiprocessing" not in " ".join(command):
        return "rank"
    return "ours" if "ds_ring" in words else None


class Run:
    """A started run of a trial."""

    def __init__(self, trial: Trial, hosts: LocalHosts, inputs: Inputs, folder: Path) -> None:
        self.hosts, self.folder, self.output = hosts, folder, folder / "out.json"
        folder.mkdir(parents=True)
        self.previous = strict_json.dumps({"status": "complete", "of": "the run before", "number": trial.number})
        self.output.write_text(self.previous)
        self.inode = self.output.stat().st_ino
        words = command_line(trial.command, hosts, inputs, self.output)
        with (folder / "stdout").open("w") as stdout, (folder / "stderr").open("w") as stderr:
            self.process = subprocess.Popen(
                hosts.command(hosts.names[0], words, ROOT), env=environment(), stdin=subprocess.DEVNULL, stdout=stdout,
                stderr=stderr,
            )  # fmt: skip

    def text(self) -> str:
        return "".join((self.folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))

    def left(self) -> dict[int, str]:
        """What runs on the hosts, but for their sshds: command lines by process."""
        found = {pid: command_of(pid) for name in self.hosts.names for pid in self.hosts.processes(name)}
        return {pid: " ".join(words)[:200] for pid, words in found.items() if words and not words[0].startswith("sshd")}

    def find(self, target: Target) -> list[int]:
        return sorted(pid for pid in self.left() if role_of(pid) == target)

    def runs(self) -> bool:
        return any(mark in self.text() for mark in RUNNING)

    def writes(self) -> bool:
        """Whether something of a result is there, or the file that will become it."""
        beside = any(name.startswith((UNFINISHED, "out.partial")) for name in os.listdir(self.folder))
        return beside or not self.output.exists() or self.output.stat().st_ino != self.inode

    def end(self) -> None:
        for pid in self.left():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        _until(lambda: not self.left(), BEYOND_S, lambda: False)


def try_once(trial: Trial, hosts: LocalHosts, inputs: Inputs, folder: Path) -> dict[str, Any]:
    """The trial's record: what was done, what was left after the limit, when all was gone (None: never), the machine's
    load, the exit code, and the result file's state."""
    run = Run(trial, hosts, inputs, folder)
    record: dict[str, Any] = asdict(trial)
    try:
        hit = _hit(trial, run)
        record |= {"hit": hit, "left": [], "gone_s": None}
        if hit:
            connect_s = inputs.connect_s if trial.phase == "loading" else 0
            record |= _outlasting(run, inputs.timeout_s + BEYOND_S + connect_s)
        record["load"] = round(os.getloadavg()[0], 1)
        # A runner that was killed while stopped has no exit code of its own.
        with suppress(subprocess.TimeoutExpired):
            run.process.wait(5)
        record["exit_code"] = run.process.returncode
        record["result"] = state_of(run.output, run.previous, inputs.reference.get(trial.command))
        record["said"] = [line[:200] for line in run.text().splitlines() if _tells(line)][:6]
    finally:
        run.end()
    return record


def _outlasting(run: Run, limit_s: float) -> dict[str, Any]:
    begun = time.monotonic()
    gone = _until(lambda: not run.left(), limit_s, lambda: False)
    left = list(run.left().values())
    # What comes too late is left all the same; but it is not what stays for ever.
    gone = gone or _until(lambda: not run.left(), LATE_S, lambda: False)
    return {"left": left, "gone_s": round(time.monotonic() - begun, 1) if gone else None}


def _hit(trial: Trial, run: Run) -> bool:
    """Wait for the phase and send the signal; False where the run ended before, or has no such process."""

    def over() -> bool:
        return run.process.poll() is not None

    found: list[int] = []
    if trial.phase == "loading":
        reached, spread_s = _until(lambda: bool(run.find("rank")), START_S, over), LOADING_S
    elif trial.phase == "running":
        reached, spread_s = _until(run.runs, START_S, over), RUNNING_S
    else:
        # Looked for before: a result is written faster than processes are found.
        reached, spread_s = _until(run.runs, START_S, over), WRITING_S
        found = run.find(trial.target)
        reached = reached and _until(run.writes, START_S, over, 0.0005)
    if not reached:
        return False
    time.sleep(trial.delay * spread_s)
    found = found or run.find(trial.target)
    if not found:
        return False
    try:
        os.kill(found[int(trial.choice * len(found))], signal.Signals[f"SIG{trial.signal}"])
    except ProcessLookupError:
        return False
    return True


def _until(condition: Callable[[], bool], limit_s: float, over: Callable[[], bool], period_s: float = 0.1) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline or over():
            return condition()
        time.sleep(period_s)
    return True


def state_of(output: Path, previous: str, reference: Any) -> str:
    """Of a result file: "previous", "complete" (and right), or what is wrong with it."""
    if not output.exists():
        return "lost"
    text = output.read_text()
    if text == previous:
        return "previous"
    try:
        document = json.loads(text)
    except ValueError:
        return "not JSON"
    if reference is not None and essence(document) != reference:
        return "wrong"
    return "complete" if document.get("status", "complete") == "complete" else f"status {document['status']}"


def essence(document: dict[str, Any]) -> Any:
    """What every run of a command writes alike."""
    if "documents" in document:
        return [[found["tokens"], round(found["nll"], 6)] for found in document["documents"]]
    return [[row.get("layout"), row.get("L")] for row in document.get("rows", [])]


def _tells(line: str) -> bool:
    words: Sequence[str] = ("failed", "error:", "ended", "ending", "interrupted", "terminated", "Traceback")
    return any(word in line for word in words) and "INFO" not in line
