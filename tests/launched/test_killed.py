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

from ds_ring.cli.seeded_checkpoint import make_checkpoint
from ds_ring.engine.connect import _group_timeout
from ds_ring.process.launcher import free_port
from ds_ring.process.parent_watch import parent_of

ROOT = Path(__file__).resolve().parents[2]
GONE_WITHIN_S = 10.0


def test_parent_of_a_process():
    assert parent_of(os.getpid()) == os.getppid()
    assert parent_of(2**22 + 1) is None


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("small")
    make_checkpoint(ROOT / "ds_configs/models/small.json", directory, seed=0, dtype="fp32", device="cpu")
    return directory


OF_A_USER = """
import os, signal, sys, time
from ds_ring.cli.options import leave
from ds_ring.config import RunConfig
from ds_ring.api import connect

def stop(where):
    if sys.argv[1] == where and os.environ["RANK"] == "1":
        print("ready", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)

stop("connecting")
connect(RunConfig.load({"dtype": "fp32"}, ring_degree=2, timeout_s=4))
stop("leaving")
if sys.argv[1] == "nowhere":
    print("ready", flush=True)
    time.sleep(100)
leave(0)
"""


@pytest.fixture
def script(tmp_path):
    """A user's own, without ``cli.main``: connects and does nothing, or rank 1 stops where the first argument says."""
    (tmp_path / "script.py").write_text(OF_A_USER)
    return tmp_path / "script.py"


def test_process_groups_wait_for_longer_than_the_watch():
    assert _group_timeout(1800).total_seconds() > 1800 + 10
    assert 2**31 > 1e3 * _group_timeout(0).total_seconds() == 1e3 * _group_timeout(2**62).total_seconds()


@pytest.mark.launch
@pytest.mark.parametrize("victim", ["runner", "launcher", "rank"])
def test_nothing_outlives_a_killed_process(victim, checkpoint, script, tmp_path):
    output, log = tmp_path / "bench.json", tmp_path / "log"
    users = victim == "launcher"
    command, begun = ([script, "nowhere"], "ready") if users else (bench(checkpoint, output), "timed passes")
    with running(command, begun, log) as (everyone, ranks):
        {"runner": everyone[0], "launcher": everyone[1], "rank": ranks[1]}[victim].send_signal(signal.SIGKILL)
        wait_until(lambda: not any(alive(process) for process in everyone), GONE_WITHIN_S, log)
        assert not output.exists()
        if victim == "rank":
            assert everyone[0].wait() != 0


@pytest.mark.launch
def test_a_stopped_rank_is_named_and_ended_with_its_peers(checkpoint, tmp_path):
    output, log = tmp_path / "bench.json", tmp_path / "log"
    # Longer than one rank may start behind the other on a busy machine.
    with running([*bench(checkpoint, output), "--timeout-s", "8"], "timed passes", log) as (everyone, ranks):
        ranks[1].send_signal(signal.SIGSTOP)
        wait_until(lambda: not any(alive(process) for process in everyone), 8 + GONE_WITHIN_S, log)
        assert not output.exists()
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("failed on rank 0: no communication")]
    assert re.search(r"in .+ \(the last is exchange, number \d+\); rank 1 of this host is stopped", line)


@pytest.mark.launch
@pytest.mark.parametrize("where", ["connecting", "leaving"])
def test_a_rank_that_stops_outside_an_engine_is_named_and_ended_with_its_peers(where, script, tmp_path):
    log = tmp_path / "log"
    with running([script, where], "ready", log) as (everyone, _):
        # From when rank 0 gets there.
        wait_until(lambda: not any(alive(process) for process in everyone), 60, log)
        assert everyone[0].wait() != 0
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("failed on rank 0: ")]
    assert re.search(rf"began for \d s in {where} \(none began\); rank 1 of this host is stopped", line)


def bench(checkpoint, output):
    """A benchmark's command, which says "timed passes" when it gets there."""
    command = ["launch/bench.py", "--model", str(checkpoint), "--ring-degree", "2", "--repeats", "1000"]
    return [*command, "--output", str(output)]


@contextmanager
def running(command, begun, log):
    """A script on two ranks that has said ``begun``: (runner, launcher and ranks; the ranks)."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    launch = ["deepspeed", "--no_local_rank", "--master_port", str(free_port()), "--num_gpus", "2"]
    with log.open("w") as file:
        runner = subprocess.Popen([*launch, *map(str, command)], cwd=ROOT, env=env, stdout=file, stderr=file)
    try:
        wait_until(lambda: begun in log.read_text(), 120, log)
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
