"""Which GPUs the deepspeed launcher is told to take."""

from __future__ import annotations

import sys

import pytest

from ds_ring.errors import ConfigError
from ds_ring.process import launcher


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
    assert launcher.where(2) == options


@pytest.mark.parametrize(("visible", "words"), [("GPU-1f,GPU-2e", "by number only"), ("3", "leaves 1 GPUs to 2 ranks")])
def test_gpus_that_ranks_cannot_get_are_refused(host, visible, words):
    host(2, visible)
    with pytest.raises(ConfigError, match=words):
        launcher.where(2)


def test_the_launcher_sees_all_gpus_it_is_to_choose_from(host, monkeypatch, tmp_path):
    host(2, "2,3")
    told = [sys.executable, "-c", "import os, sys; print(sys.argv[1:], os.environ.get('CUDA_VISIBLE_DEVICES'))"]
    started = launcher.run
    monkeypatch.setattr(launcher, "deepspeed_command", lambda: "deepspeed")
    monkeypatch.setattr(
        launcher, "run", lambda command, ranks, **options: started([*told, *command[1:]], ranks, **options)
    )
    launcher.launch("launch/bench.py", 2, [], log=tmp_path / "log", report=lambda text: None)
    said = (tmp_path / "log").read_text()
    assert "'--include', 'localhost:2,3'" in said
    assert said.endswith("] None\n")
