"""Launches: the GPUs that they take, how they end, and what is said of it."""

from __future__ import annotations

import sys
import time

import pytest

from ds_ring.errors import ConfigError, DsRingError, LaunchError
from ds_ring.process import child, launcher
from tests.helpers.limits import HANG_S
from tests.helpers.processes import runs, wait_until


@pytest.fixture
def host(monkeypatch):
    """Makes this a host whose process may use ``gpus`` GPUs, ``visible`` of them by number."""

    def make(gpus, visible):
        monkeypatch.setattr(launcher, "gpu_count", lambda: gpus)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return make


@pytest.mark.parametrize(
    ("gpus", "visible", "options"),
    [
        (4, None, ["--num_gpus", "2"]),
        (4, "", ["--num_gpus", "2"]),
        (2, "2,3", ["--include", "localhost:2,3"]),
        (3, "3, 1,0", ["--include", "localhost:3,1"]),
        (0, "2,3", ["--num_gpus", "2"]),
    ],
)
def test_ranks_get_the_gpus_that_are_visible(host, gpus, visible, options):
    host(gpus, visible)
    assert launcher.gpu_options(2) == options


@pytest.mark.parametrize(("visible", "words"), [("GPU-1f,GPU-2e", "by number only"), ("3", "leaves 1 GPUs to 2 ranks")])
def test_gpus_that_ranks_cannot_get_are_refused(host, visible, words):
    host(2, visible)
    with pytest.raises(ConfigError, match=words):
        launcher.gpu_options(2)


def test_the_launcher_sees_all_gpus_it_is_to_choose_from(host, monkeypatch, tmp_path):
    host(2, "2,3")
    told = [sys.executable, "-c", "import os, sys; print(sys.argv[1:], os.environ.get('CUDA_VISIBLE_DEVICES'))"]
    started = launcher.run
    monkeypatch.setattr(launcher, "deepspeed_command", lambda: "deepspeed")
    monkeypatch.setattr(
        launcher, "run", lambda command, ranks, **options: started([*told, *command[1:]], ranks, **options)
    )
    with pytest.raises(LaunchError, match="deepspeed ended without a result; see "):  # as where a process was killed
        launcher.launch("launch/bench.py", 2, [], log=tmp_path / "log", report=lambda text: None, timeout_s=0)
    said = (tmp_path / "log").read_text()
    assert "'--include', 'localhost:2,3'" in said
    assert said.endswith("] None\n")


def test_a_run_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(DsRingError, match=r"^sleep was ended: it took longer than 1 s; see .*log$"):
        launcher.run(["sleep", "60"], 1, log=tmp_path / "log", report=print, limit_s=1.0)


def test_a_line_that_looks_like_a_refusal_is_none_where_the_run_succeeds(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    script = "import sys; print('error: a cache could not be read'); sys.exit(int(sys.argv[1]))"
    command = [sys.executable, "-c", script]
    launcher.run([*command, "0"], 1, log=tmp_path / "log", report=print)
    assert (tmp_path / "log").read_text() == "error: a cache could not be read\n"
    for code in ("1", "2"):
        with pytest.raises(ConfigError, match=r"^a cache could not be read$"):
            launcher.run([*command, code], 1, log=tmp_path / "log", report=print)


@pytest.mark.parametrize(("heeds", "last_words"), [(True, "interrupted"), (False, "")])
def test_a_late_process_may_write_what_it_has(heeds, last_words, tmp_path, monkeypatch):
    ready, said = tmp_path / "ready", tmp_path / "said"
    script = f"""
import pathlib, signal, time
signal.signal(signal.SIGTERM, signal.default_int_handler if {heeds} else signal.SIG_IGN)
try:
    pathlib.Path({str(ready)!r}).touch()
    time.sleep({HANG_S})
except KeyboardInterrupt:
    pathlib.Path({str(said)!r}).write_text("interrupted")
"""

    def late(self, reason_to_end, look, limit_s):
        while not ready.exists():
            time.sleep(0.01)
        return "late"

    monkeypatch.setattr(child.Child, "wait", late)
    monkeypatch.setattr(child, "GRACE_S", HANG_S if heeds else 0.5)
    begun = time.monotonic()
    with pytest.raises(LaunchError, match="was ended: late; see ") as error:
        launcher.run([sys.executable, "-c", script], 1, log=tmp_path / "log", report=print)
    assert error.value.reason == "late"
    assert time.monotonic() - begun < HANG_S
    assert (said.read_text() if said.exists() else "") == last_words


def test_what_a_script_says_is_reported_while_it_runs_whatever_its_encoding(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    script = """
import os, sys, time
os.write(1, b"[ds_ring] begun \\xff\\r[ds_ring] half")
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
os.write(2, b" a line\\nnoise\\nfailed on rank 1: no [/x]")
os.write(1, b" there\\n")
sys.exit(1)
"""
    said, heard = [], tmp_path / "heard"

    def report(text):
        said.append(text)
        heard.touch()

    with pytest.raises(LaunchError, match="ended with exit code 1; the end of") as error:
        launcher.run([sys.executable, "-c", script, str(heard)], 1, log=tmp_path / "log", report=report)
    assert said == ["begun \\xff", "half a line"]
    assert error.value.reason == "no [/x] there"
    assert str(error.value).endswith("noise\nfailed on rank 1: no [/x] there\n")


def test_what_a_run_leaves_behind_ends_with_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    script = "import subprocess; print(subprocess.Popen(['sleep', '3600']).pid)"
    launcher.run([sys.executable, "-c", script], 1, log=tmp_path / "log", report=print)
    wait_until(lambda: not runs(int((tmp_path / "log").read_text())))
