"""Outputs that are refused before any work: what cannot be written, and what the command reads."""

import argparse
import os
from pathlib import Path

import pytest

from benchmarks.cli import bench, check_models, compare, longest
from ds_ring.cli import generate, make_checkpoint, options, outputs, score
from ds_ring.cli.options import run_config
from ds_ring.errors import InputError, OutputError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("config.json", "text", "model/config.json", "weights/config.json", "results/one.logs"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("{}")
    Path("link").symlink_to("config.json")
    os.link("text", "other name")
    return tmp_path


def check(module, *words, beside=()):
    args: argparse.Namespace = module.make_parser().parse_args(list(words))
    outputs.check(args, beside)
    if hasattr(args, "set"):
        run_config(args)
    return args


@pytest.mark.parametrize(
    ("module", "words", "said"),
    [
        (
            bench,
            "--config config.json --output config.json",
            "--output config.json is what --config names, config.json",
        ),
        (bench, "--config config.json --output link", "--output link is what --config names, config.json"),
        (bench, "--config config.json --trace config.json", "--trace config.json is what --config names"),
        (bench, "--references text --output text", "--output text is what --references names"),
        (bench, "--text text --output", "--output other name is what --text names, text: it would be overwritten"),
        (bench, "--output a --trace a", "/a would be written twice"),
        (bench, "--output a --then config.json a", "/a would be written twice"),
        (bench, "--then config.json config.json", "--then config.json is what --then names"),
        (score, "--model model --text text --output text", "--output text is what --text names"),
        (generate, "--model model --prompt-file text --output text", "--output text is what --prompt-file names"),
        (generate, "--model model --output model/new.json", "lies in the checkpoint model"),
        (generate, "--set model=model --output model/config.json", "lies in the checkpoint model"),
        (generate, "--output none/x.json --model no-model --config none/x.json", None),
        (make_checkpoint, "--config config.json --directory weights --output weights/x", "lies in the checkpoint"),
        (check_models, "--table text --markdown text", "--markdown text is what --table names"),
        (check_models, "--markdown text", None),
        (compare, "--layouts config.json --output config.json", "--output config.json is what --layouts names"),
        (compare, "--output results/two.md", "/results/two.md would be written twice"),
        (compare, "--output results/one.json", "its logs go to the folder results/one.logs, which is a file"),
        (compare, "--output /dev/null", "--output /dev/null is no file: .md, .png, .logs are written beside it"),
        (longest, "--output /dev/null", "--output /dev/null is no file: .logs are written beside it"),
        (score, "--output /dev/null", None),
        (score, "--output /proc/none/x", "--output /proc/none/x cannot be written: No such file or directory"),
        (score, "--output model", "--output model cannot be written: Is a directory"),
        (score, "--output=", "--output . cannot be written: Is a directory"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_outputs(module, words, said):
    beside = {compare: (".md", ".png", ".logs"), longest: (".logs",)}.get(module, ())
    words = [*words.split(), *(["other name"] if words.endswith("--output") else [])]
    contents = {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()}
    if said is None:
        outputs.check(module.make_parser().parse_args(words), beside)
    else:
        with pytest.raises(InputError) as refused:
            check(module, *words, beside=beside)
        assert said in str(refused.value)
    assert {file: file.read_bytes() for file in contents} == contents


def test_what_an_earlier_run_did_not_finish_is_removed():
    Path("a.partial.json").touch()
    Path("b.partial.json").touch()
    args = check(bench, "--output", "a.json", "--then", "config.json", "b.json", "--config", "config.json")
    assert outputs.partial(args) == ["a.partial.json", "b.partial.json"]
    outputs.remove_partial(args)
    assert outputs.partial(args) == []


@pytest.mark.parametrize(
    ("error", "there", "said"),
    [(OutputError("disk full"), b"{}\n", True), (RuntimeError("out of memory"), b"{}\n", True),
     (OutputError("disk full"), b"", False), (InputError("another job"), b"{}\n", False)],
)  # fmt: skip
def test_scores_of_a_job_that_ends_early_can_be_resumed(error, there, said, capsys):
    Path("out.jsonl").write_bytes(there)
    args = score.make_parser().parse_args(["--documents", "in.jsonl", "--scores", "out.jsonl"])
    options._say(args, error, begun=True)
    assert ("scores so far are in out.jsonl; --resume goes on with them\n" in capsys.readouterr().err) == said
