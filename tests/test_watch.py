"""What is left when a process of a launched run is killed: nothing, and no result that looks complete."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from ds_ring.checkpoints import make_checkpoint
from ds_ring.launcher import free_port
from ds_ring.watch import parent_of

ROOT = Path(__file__).resolve().parent.parent
GONE_WITHIN_S = 10.0


def test_parent_of_a_process():
    assert parent_of(os.getpid()) == os.getppid()
    assert parent_of(2**22 + 1) is None


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("small")
    make_checkpoint(ROOT / "ds_configs/models/small.json", directory, seed=0, dtype="fp32", device="cpu")
    return directory


@pytest.mark.launch
@pytest.mark.parametrize("victim", ["runner", "launcher", "rank"])
def test_nothing_outlives_a_killed_process(victim, checkpoint, tmp_path):
    output, log = tmp_path / "bench.json", tmp_path / "log"
    with running(checkpoint, output, log) as (everyone, ranks):
        {"runner": everyone[0], "launcher": everyone[1], "rank": ranks[1]}[victim].send_signal(signal.SIGKILL)
        wait_until(lambda: not any(alive(process) for process in everyone), GONE_WITHIN_S, log)
        assert not output.exists()
        if victim == "rank":
            assert everyone[0].wait() != 0


@pytest.mark.launch
def test_a_stopped_rank_is_named_and_ended_with_its_peers(checkpoint, tmp_path):
    output, log = tmp_path / "bench.json", tmp_path / "log"
    with running(checkpoint, output, log, "--timeout-s", "4") as (everyone, ranks):
        ranks[1].send_signal(signal.SIGSTOP)
        wait_until(lambda: not any(alive(process) for process in everyone), 4 + GONE_WITHIN_S, log)
        assert not output.exists()
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("failed on rank 0: no communication")]
    assert re.search(r"in .+ \(the last is exchange, number \d+\); rank 1 of this host is stopped", line)


@contextmanager
def running(checkpoint, output, log, *options):
    """A benchmark of two ranks in its timed passes: (runner, launcher and ranks; the ranks)."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path}
    command = ["deepspeed", "--no_local_rank", "--master_port", str(free_port()), "--num_gpus", "2"]
    command += ["launch/bench.py", "--model", str(checkpoint), "--ring-degree", "2", "--repeats", "1000", *options]
    with log.open("w") as file:
        runner = subprocess.Popen([*command, "--output", str(output)], cwd=ROOT, env=env, stdout=file, stderr=file)
    try:
        wait_until(lambda: "timed passes" in log.read_text(), 120, log)
        (launcher,) = psutil.Process(runner.pid).children()
        ranks = launcher.children()
        assert len(ranks) == 2
        yield [psutil.Process(runner.pid), launcher, *ranks], ranks
    finally:
        runner.kill()
        runner.wait()


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition, seconds, log):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.2)
