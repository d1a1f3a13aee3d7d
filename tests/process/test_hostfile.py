"""Hostfiles: their lines, and one that does not exist, without which DeepSpeed's launcher goes on and we do not."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from ds_ring.errors import ConfigError
from ds_ring.process import hostfile
from ds_ring.process.launcher import free_port
from tests.helpers.launching import run

RUNNER = [sys.executable, "/somewhere/bin/deepspeed"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no host"),
        ("# none\n\n", "names no host"),
        ("a slots=2\nb 4\n", 'line 2: "b 4" is not NAME slots=N'),
        ("a slots=two", "is not NAME slots=N"),
        ("a slots=2\na slots=4", "names a host twice"),
    ],
)
def test_a_hostfile_that_the_launcher_would_not_understand(text, words, tmp_path):
    file = tmp_path / "hosts"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        hostfile.read_hostfile(str(file))


def test_a_hostfile_is_read(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("localhost slots=8  # here\nno-such-host.invalid slots=8\n")
    assert hostfile.read_hostfile(str(file)) == [
        hostfile.Host("localhost", 8),
        hostfile.Host("no-such-host.invalid", 8),
    ]
    with pytest.raises(ConfigError, match=r"cannot read .*; the launcher would use this machine alone"):
        hostfile.read_hostfile(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("command", "given"),
    [
        ([*RUNNER, "--hostfile", "hosts", "script.py"], "hosts"),
        ([*RUNNER, "--num_gpus", "2", "--hostfile=hosts", "script.py", "--hostfile", "other"], "hosts"),
        ([*RUNNER, "-H", "hosts", "script.py"], "hosts"),
        ([sys.executable, "-u", "-m", "deepspeed.launcher.runner", "--host", "hosts", "script.py"], "hosts"),
        ([*RUNNER, "script.py", "--hostfile", "other"], None),
        ([*RUNNER, "--num_gpus", "2", "script.py"], None),
        (["bash", "-c", "deepspeed --hostfile hosts script.py"], None),
        ([], None),
    ],
    ids=str,
)
def test_what_the_launcher_was_given(command, given):
    assert hostfile.hostfile_of(command) == given


def test_a_hostfile_is_sought_in_the_launchers_folder(tmp_path, monkeypatch):
    launch = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", "script.py"]
    commands = {os.getppid(): launch, os.getpid(): [*RUNNER, "--hostfile", "hosts", "script.py"]}
    monkeypatch.setattr(hostfile, "parent_of", lambda pid: os.getpid())  # whose folder can be chosen
    monkeypatch.setattr(hostfile, "command_of", commands.__getitem__)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"^--hostfile hosts is no file in {tmp_path}: the launcher went on with "):
        hostfile.check_hostfile()
    Path("hosts").write_text("localhost slots=2\n")
    hostfile.check_hostfile()
    Path("hosts").unlink()
    commands[os.getppid()] = ["bash"]
    hostfile.check_hostfile()


OF_A_USER = """
import ds_ring
from ds_ring.cli.options import leave
from ds_ring.errors import ConfigError
try:
    ds_ring.from_pretrained("nowhere")
except ConfigError as error:
    print(f"error: {error}", flush=True)
leave(2)
"""


@pytest.mark.launch
@pytest.mark.parametrize("whose", ["ours", "a user's"])
def test_a_run_with_a_hostfile_that_is_not_there_is_refused(whose, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(OF_A_USER)
    what = ["launch/score.py", "--model", "nowhere"] if whose == "ours" else [str(script)]
    launcher = ["deepspeed", "--quiet", "--no_local_rank", "--master_port", str(free_port()), "--num_gpus", "2"]
    done = run([*launcher, "--hostfile", "no/hosts", *what], expect=2)
    assert "error: --hostfile no/hosts is no file in" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
