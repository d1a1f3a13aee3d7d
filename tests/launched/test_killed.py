"""What is left when a process of a launched run is killed or stopped: nothing, and no result that looks complete.

Ranks that stop do so when all others have come to a known place, and time-outs begin there: a busy machine changes
nothing.
"""

import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from ds_ring.process.launcher import reserved_port
from tests.helpers.launching import ROOT, environment, launcher, save_llama
from tests.helpers.limits import HANG_S

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


OF_A_USER = """
import os, signal, sys, time
from pathlib import Path
import ds_ring
from ds_ring.cli.options import leave
from ds_ring.config import RunConfig
from ds_ring.engine.connect import connect
from ds_ring.process.watchdog import process_watchdog

where, stopped, checkpoint = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
SHORT_S = 2

def stop():
    "Rank 1 stops here, and rank 0 goes on when it has."
    if os.environ["RANK"] == "1":
        stopped.touch()
        print("ready", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    while not stopped.exists():
        time.sleep(0.05)

def stops(*_):
    stop()
    engine.watchdog.timeout_s = SHORT_S

if where == "connecting":
    stop()
    connect(RunConfig.load({"dtype": "fp32"}, ring_degree=2, timeout_s=SHORT_S))
if where == "in a layer":
    engine = ds_ring.from_pretrained(checkpoint, dtype="fp32", ring_degree=2)
    ids = ds_ring.api.torch.arange(20)[None]
    engine(ids)
    engine.runner.decoder.layers[1].register_forward_pre_hook(stops)
    engine(ids)
connect(RunConfig.load({"dtype": "fp32"}, ring_degree=2))
if where == "leaving":
    stop()
    process_watchdog.timeout_s = SHORT_S
    leave(0)
print("ready", flush=True)
time.sleep(3600)
"""


@pytest.fixture
def script(tmp_path, checkpoint):
    """A user's own, without ``cli.options.main``; rank 1 stops in the place that it is given, or both wait."""
    (tmp_path / "script.py").write_text(OF_A_USER)
    return lambda where: [tmp_path / "script.py", where, tmp_path / "stopped", checkpoint]


@pytest.mark.parametrize("victim", ["runner", "launcher", "rank"])
def test_nothing_outlives_a_killed_process(victim, checkpoint, script, tmp_path):
    output, log = tmp_path / "bench.json", tmp_path / "log"
    command, begun = (script("nowhere"), "ready") if victim == "launcher" else (bench(checkpoint, output), "timed")
    with running(command, begun, log) as (everyone, ranks):
        {"runner": everyone[0], "launcher": everyone[1], "rank": ranks[1]}[victim].send_signal(signal.SIGKILL)
        wait_until(lambda: not any(alive(process) for process in everyone), log)
        assert not output.exists()
        if victim == "rank":
            assert everyone[0].wait() != 0


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("in a layer", r"in __call__ \(the last is \w+, number \d+\)"),
        ("connecting", r"in connecting \(none began\)"),
        ("leaving", r"in leaving \(.*\)"),
    ],
    ids=["in a layer", "connecting", "leaving"],
)
def test_a_stopped_rank_is_named_and_ended_with_the_others(where, said, script, tmp_path):
    log = tmp_path / "log"
    with running(script(where), "ready", log) as (everyone, _):
        wait_until(lambda: not any(alive(process) for process in everyone), log)
        assert everyone[0].wait() != 0
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("failed on rank 0: ")]
    assert re.search(rf"no communication began for \d+ s {said}; rank 1 of this host is stopped", line)


def bench(checkpoint: Path, output: Path) -> list[object]:
    """A benchmark's command, which says "timed passes" when it gets there."""
    command = ["launch/bench.py", "--model", checkpoint, "--dtype", "fp32", "--ring-degree", 2, "--repeats", 1_000_000]
    return [*command, "--max-length", 100, "--output", output]


@contextmanager
def running(
    command: list[object], begun: str, log: Path
) -> Iterator[tuple[list[psutil.Process], list[psutil.Process]]]:
    """A script on two ranks that has said ``begun``: (runner, launcher and ranks; the ranks)."""
    with reserved_port() as port, log.open("w") as file:
        words = list(map(str, [*launcher(2, port), *command]))
        runner = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=file, stderr=file)
        try:
            wait_until(lambda: begun in log.read_text(), log)
            (started,) = psutil.Process(runner.pid).children()
            ranks = started.children()
            assert len(ranks) == 2
            yield [psutil.Process(runner.pid), started, *ranks], ranks
        finally:
            runner.kill()
            runner.wait()


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.1)
