"""Hostfiles: their lines, and one that does not exist, without which DeepSpeed's launcher goes on and we do not."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from ds_ring.errors import ConfigError
from ds_ring.process import hostfile

RUNNER = [sys.executable, "/somewhere/bin/deepspeed"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no host"),
        ("# none\n\n", "names no host"),
        ("a slots=2\nb 4\n", 'line 2: "b 4" is not NAME slots=N'),
        ("a slots=two", "is not NAME slots=N"),
        ("a slots=2\na slots=4", "names a host twice"),
        ("a slots=0", "line 1: slots=0 must be at least 1 and at most 1024"),
        ("b slots=1\na slots=9999", "line 2: slots=9999 must be at least 1"),
        ("a slots=²", "is not NAME slots=N"),
        ("a slots=-1", "is not NAME slots=N"),
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
    file.write_bytes(bytes(range(256)))
    with pytest.raises(ConfigError, match=r"hosts is not text; a hostfile has a line NAME slots=N for each host"):
        hostfile.read_hostfile(str(file))
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
