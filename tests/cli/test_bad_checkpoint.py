"""A checkpoint with a bad field: every command ends with exit code 2 and one line, before it reads weights."""

from __future__ import annotations

import json
import sys

import pytest

from ds_ring.cli import doctor, options, plan, score
from ds_ring.cli.seeded_checkpoint import byte_tokenizer
from tests.helpers.tiny_models import build, llama_gqa

COMMANDS = {"plan": (plan, ["--ranks", "2"]), "score": (score, ["--text", "text.txt"]), "doctor": (doctor, [])}
CONFIG = {
    "type": ({"vocab_size": "97"}, "vocab_size"),
    "value": ({"hidden_act": "x"}, "hidden_act='x'"),
    "number": ({"max_position_embeddings": -1}, "max_position_embeddings=-1"),
    "dtype": ({"dtype": "int8"}, 'dtype="int8"'),
    "code": ({"auto_map": {"AutoConfig": "x.Y"}}, "auto_map"),
}
OF_WEIGHTS = {
    "layers": ({"num_hidden_layers": 1}, "num_hidden_layers=1"),
    "shape": ({"vocab_size": 98}, "its config needs (98, 72)"),
    "file": ({"transformers_weights": "x.safetensors"}, "transformers_weights='x.safetensors'"),
}
CASES = [
    (command, fields, words)
    for command in COMMANDS
    for fields, words in [*CONFIG.values(), *(OF_WEIGHTS.values() if command != "plan" else [])]
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build(llama_gqa()).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text("a text")
    return folder


@pytest.mark.parametrize(("command", "fields", "words"), CASES, ids=str)
def test_exit_code_2_and_one_line(command, fields, words, folder, tmp_path, monkeypatch, capsys):
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    config = json.loads((folder / "config.json").read_text()) | fields
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    codes: list[int] = []
    monkeypatch.setattr(options, "leave", lambda code, together=False: codes.append(code))
    for name in ("end_with_launcher", "_show_log"):  # of a process of its own
        monkeypatch.setattr(options, name, lambda: None)
    module, more = COMMANDS[command]
    monkeypatch.setattr(sys, "argv", [command, "--model", str(tmp_path), *more])
    module.main()
    said = capsys.readouterr()
    assert codes == [2]
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in said.err
    found = errors[0]
    if command == "doctor":  # as a finding, beside the others
        checks = json.loads(said.out.splitlines()[-1])["checks"]
        (found,) = [check["detail"] for check in checks if check["what"] in ("checkpoint", "configuration")]
    assert words in found
    assert str(tmp_path) in found
