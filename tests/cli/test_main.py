"""``ds-ring``: which command starts what, with which options and how many ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ds_ring.cli import main as command
from ds_ring.errors import ConfigError, UserError
from ds_ring.process import launcher
from ds_ring.process.arguments import decode
from ds_ring.process.interruption import Interrupted
from ds_ring.process.outcome import OURS
from ds_ring.utils.output_file import UNFINISHED
from tests.helpers.limits import HANG_S
from tests.helpers.processes import wait_until


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Commands that ``ds-ring`` would have started. It is in a folder with texts and something like a model."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "DIR/config.json"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("{}")
    found: list[list[str]] = []
    monkeypatch.setattr(command, "supervise", lambda line, environment, timeout_s: found.append(line) or 0)
    monkeypatch.setattr(launcher, "deepspeed_command", lambda: "deepspeed")
    monkeypatch.setattr(launcher, "gpu_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return found


def run(*words: str) -> int:
    return command._run(words)


def test_a_model_is_generated_from_by_as_many_ranks_as_there_are_gpus(started):
    run("generate", "DIR", "--prompt", "a question")
    (line,) = started
    assert line[0] == "deepspeed"
    assert line[line.index("--num_gpus") + 1] == "4"
    assert line[line.index("--module") :] == [
        "--module", "ds_ring.cli.launched", "ds_ring.cli.generate", "--model", "DIR", "--prompt", "a question",
    ]  # fmt: skip


@pytest.mark.parametrize("ranks", [["--ranks", "2"], ["--ranks=2"]], ids=" ".join)
def test_ranks_may_be_given(started, ranks):
    run("score", "DIR", "a.txt", "b.txt", *ranks, "--max-length", "9")
    (line,) = started
    assert line[line.index("--num_gpus") + 1] == "2"
    assert line[line.index("--module") :] == [
        "--module", "ds_ring.cli.launched", "ds_ring.cli.score",
        "--model", "DIR", "--text", "a.txt", "b.txt", "--max-length", "9",
    ]  # fmt: skip


def test_what_a_killed_rank_left_beside_an_output_is_removed(started, monkeypatch):
    def killed(line, environment, timeout_s):
        (tmp := Path("folder")).mkdir(exist_ok=True)
        (tmp / f"{UNFINISHED}{os.uname().nodename}.{2**22 + 1}.abc").write_text("half")
        (tmp / "kept").write_text("")
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(command, "supervise", killed)
    with pytest.raises(Interrupted):
        run("generate", "DIR", "--prompt", "a question", "--output", "folder/out.json")
    assert [file.name for file in Path("folder").iterdir()] == ["kept"]


def test_without_gpus_there_is_one_rank(started, monkeypatch):
    monkeypatch.setattr(launcher, "gpu_count", lambda: 0)
    run("generate", "DIR", "--prompt", "a question")
    assert started[0][started[0].index("--num_gpus") + 1] == "1"


def test_the_hosts_of_a_hostfile_get_letters_that_no_shell_evaluates(started, monkeypatch, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\nother slots=2\n")
    Path("$(x).txt").write_text("text")
    monkeypatch.setattr(launcher.shutil, "which", lambda _: "pdsh")
    run("score", "DIR", "$(x).txt", "--hostfile", str(hosts), "--ring-degree", "4")
    (command_of,) = started
    *words, letters = command_of({"DS_RING_OUTCOME": "a file"})
    assert words[words.index("--hostfile") + 1] == str(hosts)
    assert words[-2:] == ["--module", "ds_ring.cli.encoded"]
    module, arguments, environment = decode(letters)
    assert environment["DS_RING_OUTCOME"] == "a file"
    assert (module, arguments) == (
        "ds_ring.cli.score", ["--model", "DIR", "--text", "$(x).txt", "--ring-degree", "4"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("hosts", "options", "text"),
    [
        ("localhost slots=2\n", ["--ranks", "2"], "--ranks and --hostfile exclude each other"),
        ("", [], "names no host"),
        (None, [], "cannot read .*hosts"),
        ("192.0.2.1 slots=2\nlocalhost slots=2\n", [], "192.0.2.1, the first host of .*, is another one; start there"),
        ("localhost slots=2\n", [], "pdsh, by which DeepSpeed's launcher starts other hosts, is not installed"),
    ],
)
def test_hostfiles_that_cannot_work_are_refused(hosts, options, text, started, monkeypatch, tmp_path):
    monkeypatch.setattr(launcher.shutil, "which", lambda _: None)
    if hosts is not None:
        (tmp_path / "hosts").write_text(hosts)
    with pytest.raises(ConfigError, match=text):
        run("score", "DIR", "a.txt", "--hostfile", str(tmp_path / "hosts"), *options)
    assert started == []


def test_other_commands_run_here_with_their_own_ranks(monkeypatch):
    ran: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(command.runpy, "run_module", lambda module, run_name: ran.append((module, sys.argv[1:])))
    monkeypatch.setattr(sys, "argv", ["ds-ring"])
    assert run("plan", "DIR", "--ranks", "16") == 0
    assert run("generate", "--help") == 0
    assert ran == [
        ("ds_ring.cli.plan", ["--model", "DIR", "--ranks", "16"]), ("ds_ring.cli.generate", ["--help"]),
    ]  # fmt: skip


def test_help_of_a_launched_command_has_what_starts_ranks(monkeypatch, capsys):
    monkeypatch.setattr(command.runpy, "run_module", lambda module, run_name: None)
    monkeypatch.setattr(sys, "argv", ["ds-ring"])
    assert run("score", "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("ds-ring score DIR FILE… [--ranks N | --hostfile FILE] and the options below\n")
    assert '\n  --hostfile FILE       hosts and their slots, one a line ("name slots=8"), of which this' in shown


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["generat"], "there is no command generat; take one of generate, score"),
        (["generate", "DIR", "a text"], "a text: generate takes one model"),
        (["generate", "DIR", "--ranks", "0"], "--ranks 0 must be a whole number of at least 1"),
        (["generate", "DIR", "--ranks"], "^--ranks has no value: give --ranks N, a whole number of at least 1$"),
        (["generate", "DIR", "--ranks="], "^--ranks has no value: give --ranks N, a whole number of at least 1$"),
        (["generate", "DIR", "--ranks", "--prompt", "a"], "^--ranks has no value: give --ranks N, a whole number"),
        (["generate", "DIR", "--hostfile="], "^--hostfile has no value: give --hostfile FILE$"),
        (["generate", "DIR", "--ranks", "1e3"], "--ranks 1e3 must be a whole number of at least 1"),
        (["generate", "DIR", "--prompt", "a", "--ranks", "5"], "--ranks 5: there are 4 GPUs"),
        (["generate", "DIR", "--promt", "a"], "unrecognized arguments: --promt a"),
        (
            ["generate", "DIR", "--prompt", "a", "--seed", "-1"],
            "--seed: -1 must be a whole number from 0 to 1844674407",
        ),
        (["generate", "DIR"], "no prompt: give --prompt TEXT"),
        (["generate", "none", "--prompt", "a"], "none is not a checkpoint directory"),
        (["generate", "DIR", "--prompt", "a", "--ring-degree", "3"], "= 3 ranks, but 4 were launched"),
        (["generate", "DIR", "--prompt-file", "none.txt"], "cannot read none.txt: No such file or directory"),
        (["score", "DIR"], "no documents: give --text FILE"),
        (["score", "DIR", "a.txt", "--output", "a.txt"], "--output a.txt is what --text names"),
        (
            ["bench", "--model", "DIR", "--config", "a.txt", "--output", "a.txt"],
            "--output a.txt is what --config names",
        ),
        (["bench", "--model", "DIR", "--ring-degree", "2", "--ranks", "3"], "= 2 ranks, but 3 were launched"),
        (["bench", "--model", "DIR", "--ring-degree", "4", "--references", "x"], "cannot read x: no such file"),
        (
            ["bench-generate", "DIR", "--prompt", "a", "--passes", "0"],
            "--passes: 0 must be a whole number of at least 1",
        ),
    ],
)
def test_mistakes_are_refused_before_anything_is_started(started, words, text):
    with pytest.raises(UserError, match=text):
        run(*words)
    assert started == []


def test_every_command_names_a_module_that_is_there():
    from importlib.util import find_spec

    assert all(find_spec(module) for module in (command.LAUNCHED | command.HERE).values())


@pytest.mark.parametrize("words", [["-m", "ds_ring", "plan"], ["launch/plan.py"]], ids=" ".join)
def test_an_interrupt_while_packages_are_imported_is_one_line(words, tmp_path):
    """The first of them is replaced by one that takes for ever."""
    (tmp_path / "pydantic.py").write_text(f"import time; open({str(tmp_path / 'ready')!r}, 'w'); time.sleep(3600)")
    process = subprocess.Popen(
        [sys.executable, *words, "--help"], cwd=launcher.ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until((tmp_path / "ready").exists)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=HANG_S)
    assert (process.returncode, said) == (130, "interrupted by SIGINT\n")


def test_an_error_of_ours_is_shown(monkeypatch, capsys):
    def broken(options):
        raise AttributeError("no such part")

    left = []
    monkeypatch.setattr(command, "_run", broken)
    monkeypatch.setattr(command, "raise_on_signals", lambda: None)
    monkeypatch.setattr(command.os, "_exit", left.append)
    command.main()
    assert left == [OURS]
    assert "AttributeError: no such part" in capsys.readouterr().err
