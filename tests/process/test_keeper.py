"""What is left of a command that is killed: none of its processes, none of its scratch folders."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ds_ring.process.keeper import Keeper, scratch_folder
from ds_ring.process.launcher import ROOT
from tests.helpers.processes import runs, wait_until

COMMAND = """
import os, subprocess, sys, time
from pathlib import Path
from ds_ring.process.keeper import Keeper, scratch_folder

said = Path(sys.argv[1])
with Keeper() as keeper, scratch_folder(said.parent) as scratch:
    (scratch / "file").touch()
    child = subprocess.Popen(["sleep", "3600"], start_new_session=True)
    with keeper.group(child.pid):
        partial = said.with_suffix(".partial")
        partial.write_text(f"{child.pid} {scratch}")
        partial.rename(said)
        time.sleep(3600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_whatever_ends_a_command_ends_its_processes_and_removes_its_folders(number, tmp_path):
    said = tmp_path / "said"
    command = subprocess.Popen([sys.executable, "-c", COMMAND, said], cwd=ROOT)
    wait_until(said.exists)
    child, scratch = said.read_text().split()
    assert runs(int(child))
    assert (Path(scratch) / "file").exists()
    command.send_signal(number)
    assert command.wait() == -number
    wait_until(lambda: not runs(int(child)) and not Path(scratch).exists())


def test_nothing_is_cleared_up_after_a_command_that_ends_by_itself(tmp_path):
    child = subprocess.Popen(["sleep", "3600"], start_new_session=True)
    kept = tmp_path / "kept folder\n2"
    kept.mkdir()
    try:
        with Keeper() as keeper, keeper.group(child.pid), keeper.folder(kept):
            pass
        with Keeper() as keeper:
            keeper.group(child.pid).__enter__()
        assert child.poll() is None
        assert kept.is_dir()
    finally:
        child.kill()
        child.wait()


def test_a_scratch_folder_goes_with_its_block_and_a_killed_keeper_harms_nothing(tmp_path):
    with scratch_folder(tmp_path) as scratch:
        (scratch / "file").touch()
        with Keeper() as keeper:
            os.kill(keeper._process.pid, signal.SIGKILL)
            keeper._process.wait()
            with keeper.folder(scratch):
                pass
    assert list(tmp_path.iterdir()) == []
