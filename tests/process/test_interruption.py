"""Signals at moments of a command: one line and 128 + n, also while packages are imported."""

import os
import signal
import subprocess
import sys

import pytest

from ds_ring.process import interruption
from ds_ring.process.interruption import Interrupted
from ds_ring.process.launcher import ROOT
from tests.helpers.limits import HANG_S
from tests.helpers.processes import wait_until

WAIT = "open('ready', 'w').close(); time.sleep(3600)"
SWALLOWS = f"""
try:
    {WAIT}
except BaseException:
    raise ImportError("a package that wraps what ends its import")
"""
MOMENTS = {
    "while the command is imported": "import time\n" + SWALLOWS,
    "while it imports a package": "def main(): import package",
    "at work": f"import time\ndef main(): {WAIT}",
    "at work, in a library that wraps errors": "import time\ndef main():" + SWALLOWS.replace("\n", "\n    "),
}


@pytest.fixture
def start(tmp_path):
    """Starts a command with this source, and waits until it is ready."""
    (tmp_path / "package.py").write_text("import time\n" + SWALLOWS)

    def started(source, *before, **variables):
        (tmp_path / "command.py").write_text(source)
        words = [*before, sys.executable, "-c", "from ds_ring.process.interruption import start; start('command')"]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}", **variables}
        pipe = subprocess.PIPE
        process = subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe, text=True)
        wait_until((tmp_path / "ready").exists)
        return process

    return started


def ended(process):
    out, err = process.communicate(timeout=HANG_S)
    return process.returncode, out, err


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("source", MOMENTS.values(), ids=MOMENTS)
def test_a_signal_at_any_moment_is_one_line(source, name, start):
    process = start(source)
    process.send_signal(signal.Signals[name])
    assert ended(process) == (128 + signal.Signals[name], "", f"interrupted by {name}\n")


@pytest.mark.parametrize(("rank", "code", "said"), [("0", 130, "interrupted by SIGINT\n"), ("1", -2, "")])
def test_a_rank_that_imports_dies_of_an_interrupt_and_rank_0_says_so(rank, code, said, start):
    process = start(MOMENTS["while the command is imported"], RANK=rank)
    process.send_signal(signal.SIGINT)
    assert ended(process) == (code, "", said)


def test_what_is_ignored_stays_so_and_may_be_ignored_by_a_command_alone(start):
    """As in a shell's background job; what the command starts dies of the signal only in the second case."""
    child = "subprocess.run([sys.executable, '-c', 'import os, signal; os.kill(os.getpid(), 2); print(7)'])"
    source = f"""
import os, signal, subprocess, sys
from ds_ring.process.interruption import ignore_here_alone
def main():
    os.kill(os.getpid(), signal.SIGINT)
    code = {child}.returncode
    ignore_here_alone()
    os.kill(os.getpid(), signal.SIGINT)
    print(code, {child}.returncode)
    open("ready", "w").close()
"""
    shell = ["bash", "-c", 'trap "" INT; exec "$@"', "bash"]
    code, out, _ = ended(start(source, *shell))
    assert (code, out.splitlines()[-1], out.count("7\n")) == (0, "0 -2", 1)


def test_the_second_signal_ends_a_command_that_does_not(start):
    source = f"""
import time
def main():
    try:
        time.sleep(0.2)
        {WAIT}
    finally:
        open("cleaning", "w").close()
        time.sleep(3600)
"""
    process = start(source)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: os.path.exists(os.path.join(process_folder(process), "cleaning")))
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (143, "", "interrupted by SIGTERM\n")


def process_folder(process):
    return os.readlink(f"/proc/{process.pid}/cwd")


def test_a_deferred_signal_is_raised_once_at_the_end_of_the_outermost_block(monkeypatch):
    monkeypatch.setattr(interruption, "_state", interruption._State())
    monkeypatch.setattr(interruption.threading, "Timer", lambda *_: type("Never", (), {"start": lambda _: None})())
    monkeypatch.setattr(interruption, "_handle", lambda handler: None)
    reached = []

    def work():
        with interruption.deferred():
            with interruption.deferred():
                interruption._interrupt(signal.SIGTERM, None)
                reached.append("inner")
            reached.append("outer")
        reached.append("beyond")

    with pytest.raises(Interrupted, match="interrupted by SIGTERM"):
        work()
    assert reached == ["inner", "outer"]
    with interruption.deferred():  # while what was started is cleared up
        reached.append("later")
    assert str(interruption.received()) == "interrupted by SIGTERM"
