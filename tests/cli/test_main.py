"""``ds-ring``: which command starts what, with which options and how many ranks."""

from __future__ import annotations

import os
import sys

import pytest

from ds_ring.cli import main as command
from ds_ring.errors import ConfigError
from ds_ring.process import launcher


@pytest.fixture
def started(monkeypatch):
    """Lists of words that ``ds-ring`` would have replaced itself with."""
    found: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda file, line, environment: found.append(line))
    monkeypatch.setattr(launcher, "deepspeed_command", lambda: "deepspeed")
    monkeypatch.setattr(launcher, "gpu_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return found


def run(*words: str) -> None:
    command._run(words)


def test_a_model_is_generated_from_by_as_many_ranks_as_there_are_gpus(started):
    run("generate", "DIR", "--prompt", "a question")
    (line,) = started
    assert line[0] == "deepspeed"
    assert line[line.index("--num_gpus") + 1] == "4"
    assert line[line.index("--module") :] == [
        "--module", "ds_ring.cli.generate", "--model", "DIR", "--prompt", "a question",
    ]  # fmt: skip


@pytest.mark.parametrize("ranks", [["--ranks", "2"], ["--ranks=2"]], ids=" ".join)
def test_ranks_may_be_given(started, ranks):
    run("score", "DIR", "a.txt", "b.txt", *ranks, "--max-length", "9")
    (line,) = started
    assert line[line.index("--num_gpus") + 1] == "2"
    assert line[line.index("--module") :] == [
        "--module", "ds_ring.cli.score", "--model", "DIR", "--text", "a.txt", "b.txt", "--max-length", "9",
    ]  # fmt: skip


def test_without_gpus_there_is_one_rank(started, monkeypatch):
    monkeypatch.setattr(launcher, "gpu_count", lambda: 0)
    run("generate", "DIR")
    assert started[0][started[0].index("--num_gpus") + 1] == "1"


def test_other_commands_run_here_with_their_own_ranks(monkeypatch):
    ran: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(command.runpy, "run_module", lambda module, run_name: ran.append((module, sys.argv[1:])))
    monkeypatch.setattr(sys, "argv", ["ds-ring"])
    run("plan", "DIR", "--ranks", "16")
    run("generate", "--help")
    assert ran == [
        ("ds_ring.cli.plan", ["--model", "DIR", "--ranks", "16"]), ("ds_ring.cli.generate", ["--help"]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["generat"], "there is no command generat; take one of generate, score"),
        (["generate", "DIR", "a text"], "a text: generate takes one model"),
        (["generate", "DIR", "--ranks", "0"], "--ranks 0 must be a whole number of at least 1"),
        (["generate", "DIR", "--ranks"], "--ranks  must be"),
    ],
)
def test_mistakes_are_refused(started, words, text):
    with pytest.raises(ConfigError, match=text):
        run(*words)


def test_every_command_names_a_module_that_is_there():
    from importlib.util import find_spec

    assert all(find_spec(module) for module in (command.LAUNCHED | command.HERE).values())
