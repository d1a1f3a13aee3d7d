"""Arguments on their way to other hosts: encoded, so that no shell evaluates them; or compared with what was given."""

import re
import subprocess
import sys

import pytest

from ds_ring.errors import ConfigError
from ds_ring.process import arguments
from ds_ring.process.arguments import changed, decode, encode

LAUNCHER = ["python", "bin/deepspeed", "--hostfile", "hosts"]
OWN = ["python", "-u", "launch/generate.py", "--model", "DIR", "--prompt"]


@pytest.mark.parametrize("prompt", ["$(touch x)", "a; b", 'it\'s "so"', "`x` \\ & | * ~ \n é", "", " "])
def test_an_encoded_command_comes_back_as_it_was_and_means_nothing_to_a_shell(prompt):
    letters = encode(
        "a.b", ["--prompt", prompt], {"HF_HOME": "/x y", "DS_ACCELERATOR": "cpu", "SECRET": "s", "HF_TOKEN": "s"}
    )
    assert re.fullmatch(r"[A-Za-z0-9_-]+", letters)
    assert decode(letters) == ("a.b", ["--prompt", prompt], {"HF_HOME": "/x y", "DS_ACCELERATOR": "cpu"})


def test_what_is_too_long_for_a_command_line_is_refused(monkeypatch):
    monkeypatch.setattr(arguments, "LONGEST", 50)
    with pytest.raises(ConfigError, match=r"letters on their way to other hosts, and 50 is the most; .*--prompt-file"):
        encode("a.b", ["--prompt", "x y z w " * 10], {})


def test_an_encoded_command_runs_with_its_arguments_and_environment(tmp_path):
    (tmp_path / "shown.py").write_text(
        "import os, sys\ndef main(): print(sys.argv, os.environ['HF_HOME'], os.environ['HF_HUB'])\n"
    )
    letters = encode("shown", ["$(x)", "b c"], {"HF_HOME": "theirs", "HF_HUB": "passed on"})
    done = subprocess.run(
        [sys.executable, "-m", "ds_ring.cli.encoded", letters], capture_output=True, text=True,
        env={"PYTHONPATH": f"{tmp_path}:.", "HF_HOME": "own"},
    )  # fmt: skip
    assert done.stdout == "['shown', '$(x)', 'b c'] own passed on\n"


@pytest.mark.parametrize(
    ("given", "got", "lost"),
    [
        ("plain", "plain", None),
        ("two  words", "two  words", None),
        ("$(hostname)", "host1", "$(hostname)"),
        ("a;b", "a", "a;b"),
        ('say "so"', "say so", 'say "so"'),
    ],
)
def test_what_a_shell_changed_is_named(given, got, lost):
    assert changed([*LAUNCHER, "launch/generate.py", "--model", "DIR", "--prompt", given], [*OWN, got]) == lost


def test_what_is_missing_or_split_is_named():
    words = [*LAUNCHER, "launch/generate.py", "--model", "DIR", "--prompt"]
    assert changed([*words, "a b"], [*OWN, "a", "b"]) == "a b"
    assert changed([*words, ""], OWN) == ""
    assert changed([*LAUNCHER, "--module", "a.b", "x"], ["python", "-u", "-m", "a.b", "x"]) is None
    assert changed([*LAUNCHER, "x.py"], ["python", "-u", "x.py"]) is None


def test_a_rank_on_the_launchers_host_refuses(monkeypatch):
    commands = {7: [*LAUNCHER, "x.py", "$(id)"], arguments.os.getpid(): ["python", "-u", "x.py", "--local_rank=0", "0"]}
    monkeypatch.setattr(arguments, "find_pdsh", lambda: 8)
    monkeypatch.setattr(arguments, "parent_of", lambda _: 7)
    monkeypatch.setattr(arguments, "command_of", lambda pid: commands[pid])
    with pytest.raises(ConfigError, match=r"changed the argument '\$\(id\)': .* --hostfile, or --prompt-file"):
        arguments.check_arguments()
    monkeypatch.setattr(arguments, "find_pdsh", lambda: None)
    assert arguments.check_arguments() is None
