"""``make_checkpoint``: a directory that is complete or not there, and nothing overwritten."""

import json
from pathlib import Path

import pytest

from ds_ring.cli import make_checkpoint, seeded_checkpoint
from ds_ring.errors import ConfigError, OutputError
from ds_ring.process.launcher import ROOT

SMALL = str(ROOT / "ds_configs/models/small.json")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("full").mkdir()
    Path("full/weights").touch()
    Path("empty").mkdir()


def args(*words):
    found = make_checkpoint.make_parser().parse_args([*words])
    make_checkpoint.check(found)
    return found


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--config", SMALL, "--directory", "file"], "--directory file is a file; name another"),
        (["--config", SMALL, "--directory", "full"], "--directory full is not empty; remove it, or name another"),
        (["--config", SMALL, "--directory", "file/x"], "--directory file/x cannot be made: File exists"),
        (["--config", SMALL, "--directory", "x" * 300], "x cannot be made: File name too long"),
        (["--config", SMALL, "--directory", "/proc/none/x"], "cannot be made: No such file or directory"),
        (["--config", "none", "--directory", "new"], "cannot read none: no such file"),
        (["--gguf", "empty", "--directory", "new"], "cannot read empty: it is a folder"),
        (["--config", SMALL, "--directory", "new", "--device", "tpu"], "--device tpu is none of cpu, cuda, cuda:N"),
        (
            ["--config", SMALL, "--directory", "new", "--seed", str(2**64)],
            "--seed: 18446744073709551616 must be a whole",
        ),
        (["--config", SMALL, "--directory", "new", "--seed", "-1"], "--seed: -1 must be a whole number from 0"),
        (["--config", SMALL, "--gguf", "file", "--directory", "new"], "not allowed with argument --config"),
        (["--directory", "new"], "one of the arguments --config --gguf is required"),
    ],
)
def test_what_cannot_be_made_is_refused_before_any_work(words, why):
    before = sorted(map(str, Path().rglob("*")))
    with pytest.raises(ConfigError) as refused:
        args(*words)
    assert why in str(refused.value)
    assert sorted(map(str, Path().rglob("*"))) == before


@pytest.mark.parametrize("directory", ["new/one", "empty"])
def test_a_checkpoint_appears_when_it_is_complete(directory, monkeypatch):
    made = args("--config", SMALL, "--directory", directory, "--seed", "3", "--dtype", "fp32", "--device", "cpu")
    with monkeypatch.context() as patch:

        def full(config, folder, **options):
            Path(folder).mkdir()
            Path(folder, "config.json").touch()
            raise OSError(28, "No space left on device")

        patch.setattr(seeded_checkpoint, "make_checkpoint", full)
        with pytest.raises(OutputError, match=f"^--directory {directory} could not be written: No space left"):
            make_checkpoint.work(made)
    assert not Path(directory, "config.json").exists()
    found = make_checkpoint.work(made)
    assert found["directory"] == directory
    assert json.loads(Path(directory, "config.json").read_text())["dtype"] == "float32"
    assert not list(Path(directory).parent.glob("ds_ring.*"))
