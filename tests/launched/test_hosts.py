"""Two hosts, as namespaces of this machine that ssh and pdsh reach: results, and what ends all of them."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from ds_ring.process.processes import command_of
from ds_ring.testing.local_hosts import LocalHosts, unavailable
from tests.helpers.launching import ROOT, environment, last_line, run, save_llama
from tests.helpers.limits import HANG_S

NAMES = ["host1", "host2"]
TIMEOUT_S = 12
"""Longer than a busy machine takes to read its packages while it connects."""
pytestmark = [
    pytest.mark.launch,
    pytest.mark.skipif(unavailable() is not None, reason=f"this machine cannot play several hosts: {unavailable()}"),
]

OF_A_USER = f"""
import os, sys, time
from ds_ring.config import RunConfig
from ds_ring.engine.connect import connect
what = sys.argv[1]
if what == "fails" and os.environ["RANK"] == "1":
    sys.exit("no GPU on this host")
timeout_s = 60 if what == "fails" else {TIMEOUT_S}
connect(RunConfig.load({{"dtype": "fp32"}}, ring_degree=2, timeout_s=timeout_s))
print("ready", flush=True)
time.sleep(3600)
"""


@pytest.fixture(scope="module")
def hosts():
    """Their own names are 127.0.1.1 to them, as Debian has it."""
    with LocalHosts(NAMES, slots=1, own_name_is_local=True) as made:
        yield made


@pytest.fixture
def script(tmp_path):
    (tmp_path / "script.py").write_text(OF_A_USER)
    return tmp_path / "script.py"


def deepspeed(hosts, *command):
    return ["deepspeed", "--no_local_rank", "--hostfile", hosts.hostfile, *command]


class Launch:
    """A command on the first host, which starts others on all of them."""

    def __init__(self, hosts, log, *command):
        self.hosts, self.log = hosts, log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                hosts.command(NAMES[0], list(map(str, command)), ROOT), env=environment(), stdin=subprocess.DEVNULL,
                stdout=file, stderr=file,
            )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in self.left():
            os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()

    def text(self):
        return self.log.read_text()

    def wait(self, condition, limit_s=HANG_S):
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, f"{self.text()[-3000:]}\nleft: {self.commands_left()}"
            time.sleep(0.1)

    def find(self, host, word):
        return next(pid for pid in self.hosts.processes(host) if any(word in part for part in command_of(pid)[:5]))

    def commands_left(self):
        return [(pid, " ".join(command_of(pid))[:200]) for pid in self.left()]

    def left(self):
        return [
            pid
            for name in NAMES
            for pid in self.hosts.processes(name)
            if not "".join(command_of(pid)).startswith("sshd")
        ]


def test_a_score_over_two_hosts_is_that_of_one_process(hosts, tmp_path):
    """And the name of a file is what it is, not what a shell makes of it."""
    checkpoint, text = save_llama(tmp_path / "llama"), tmp_path / "a; $(touch evaluated) 'b'.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    command = ["score", checkpoint, text, "--max-length", 2000]
    (alone,) = last_line(run(["python", "launch/score.py", "--model", *command[1:2], "--text", *command[2:]]))[
        "documents"
    ]
    output = tmp_path / "score.json"
    words = ["python", "-m", "ds_ring", *command, "--ring-degree", 2, "--output", output]
    with Launch(hosts, tmp_path / "log", *words, "--hostfile", hosts.hostfile) as launch:
        assert launch.process.wait(HANG_S) == 0, launch.text()[-3000:]
    (shared,) = json.loads(output.read_text())["documents"]
    assert (shared["file"], shared["tokens"]) == (str(text), alone["tokens"])
    assert shared["nll"] == pytest.approx(alone["nll"], rel=1e-6)
    assert not (ROOT / "evaluated").exists()


def test_a_host_that_fails_to_start_is_named_by_the_other(hosts, script, tmp_path):
    with Launch(hosts, tmp_path / "log", *deepspeed(hosts, script, "fails")) as launch:
        launch.wait(lambda: not launch.left())
        assert launch.process.wait(HANG_S) != 0
        said = "host2 ended before all ranks had started; see what was said there"
        assert re.search(said, launch.text()), launch.text()[-3000:]


@pytest.mark.parametrize(
    ("host", "victim", "number", "said"),
    [
        ("host1", "bin/deepspeed", signal.SIGKILL, "rank 0: the launcher is gone, ending"),
        ("host2", "script.py", signal.SIGSTOP, f"nothing was heard of rank 1 of host2 for {TIMEOUT_S} s: stopped"),
    ],
    ids=["the runner killed", "a rank alone on its host stopped"],
)
def test_nothing_is_left_on_any_host(host, victim, number, said, hosts, script, tmp_path):
    with Launch(hosts, tmp_path / "log", *deepspeed(hosts, script, "waits")) as launch:
        launch.wait(lambda: launch.text().count("ready") == 2)
        os.kill(launch.find(host, victim), number)
        launch.wait(lambda: not launch.left(), TIMEOUT_S + 15)
        assert re.search(said, launch.text()), launch.text()[-3000:]


def test_hosts_leave_nothing_behind():
    """Not even for the moment that many processes take to end."""
    many = ["sh", "-c", "hostname; for n in $(seq 100); do sleep 1000 >/dev/null & done"]
    with LocalHosts(["alone"], slots=1) as made:
        folder = made.folder
        assert subprocess.check_output(made.command("alone", many), text=True) == "alone\n"
        left = [*made._inits.values(), *made.processes("alone")]
        assert len(left) >= 102
    assert not folder.exists()
    assert [pid for pid in left if Path(f"/proc/{pid}").exists()] == []
