"""Records that are missing: which commands make them, with how many GPUs and how much time."""

import json
import re
import shlex
import sys

import pytest

from benchmarks.reports import page, record
from ds_ring.errors import ConfigError
from ds_ring.process.launcher import ROOT
from tests.helpers.pages import PROVENANCE


def source(name, gpus=1, code="pass", output=None):
    """A record and a command that writes it."""
    text = f"import json; json.dump({PROVENANCE!r}, open({str(output or f'results/{name}.json')!r}, 'w'))"
    return {"file": f"{name}.json", "command": shlex.join(["python", "-c", f"# --num_gpus {gpus}\n{code}; {text}"])}


@pytest.fixture
def recorded(tmp_path):
    def run(sources, names=(), gpus=1, limit_s=60.0, preparations=()):
        sections = [{"title": "One", "kind": "attention", "sources": sources}]
        document = {"introduction": "", "preparations": list(preparations), "sections": sections}
        (tmp_path / page.RESULTS).mkdir(parents=True, exist_ok=True)
        (tmp_path / page.MANIFEST).write_text(json.dumps(document))
        said = []
        found = record.record(tmp_path, names, limit_s, gpus, said.append)
        return found, {file.stem for file in (tmp_path / page.RESULTS).glob("*.json")}, said

    return run


def test_the_launcher_takes_gpus_that_are_visible(recorded, monkeypatch):
    started = []
    monkeypatch.setattr(record, "run", lambda words, ranks, **options: started.append((words, options["unset"])))
    monkeypatch.setattr("ds_ring.process.launcher.gpu_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    commands = ["deepspeed --quiet --num_gpus 2 launch/bench.py", "python launch/compare.py"]
    recorded([{"file": f"{n}.json", "command": command} for n, command in enumerate(commands)], gpus=2)
    assert started == [
        (["deepspeed", "--quiet", "--include", "localhost:2,3", "launch/bench.py"], ("CUDA_VISIBLE_DEVICES",)),
        ([sys.executable, "launch/compare.py"], ()),
    ]


def test_what_is_missing_is_made_as_far_as_it_can_be(recorded):
    sources = [source("here"), source("two", gpus=2), source("fails", code="assert False")]
    sources += [source("elsewhere", output="results/other"), {"file": "never.json", "command": None}]
    found, files, said = recorded(sources)
    assert found["left_out"] == {
        "two.json": "needs 2 GPUs",
        "fails.json": "ended with exit code 1; see results/fails.log",
        "elsewhere.json": "gave no results/elsewhere.json",
    }
    assert files == {"here"} == {name.removesuffix(".json") for name in found["recorded"]}
    assert len(said) == 3
    assert recorded(sources[:1])[0] == {"recorded": {}, "left_out": {}}
    assert list(recorded(sources[:1], names=["here.json"])[0]["recorded"]) == ["here.json"]
    assert recorded(sources[1:2], gpus=2)[1] == {"here", "two"}


def test_time_ends(recorded):
    slow = source("slow", code="import time; time.sleep(600)")
    found, files, _ = recorded([slow, source("behind")], limit_s=1.0)
    assert re.fullmatch(r"did not end in \d s; see results/slow\.log", found["left_out"]["slow.json"])
    assert found["left_out"]["behind.json"] == "no time left"
    assert files == set()


def test_what_a_cut_command_had_is_kept_beside_and_is_no_record(recorded, tmp_path):
    write = f"import json, time; json.dump({PROVENANCE!r} | {{'had': 1}}, open('results/cut.partial.json', 'w'))"
    cut = source("cut", code=f"{write}; time.sleep(600)")
    reason, kept = r"did not end in \d s; see results/cut\.log", tmp_path / page.RESULTS / "cut.json"
    # Long enough for a busy machine to start the command.
    left_out = recorded([cut], limit_s=6.0)[0]["left_out"]
    assert re.fullmatch(f"{reason}; what it had by then is in results/cut.partial.json", left_out["cut.json"])
    assert json.loads((tmp_path / "results/cut.partial.json").read_text())["had"] == 1
    assert not kept.exists()


def test_a_partial_result_is_no_record(recorded):
    partial = source("partial", code="pass")
    partial["command"] = partial["command"].replace("{", '{"status": "partial", ', 1)
    found, files, _ = recorded([partial])
    assert files == set()
    assert "partial.json is a partial result" in found["left_out"]["partial.json"]


def test_what_a_command_needs_is_made_before(recorded, tmp_path):
    makes = {
        "makes": "text",
        "command": "python -c \"open('text', 'w').write('1234567'[2 * 3 :])\"",
        "wanted_by": ["text"],
    }
    reads = source("reads", code="assert open('text').read() == '7'")
    assert recorded([reads], preparations=[makes])[1] == {"reads"}
    (tmp_path / "text").write_text("8")  # there already
    assert recorded([reads], names=["reads.json"], preparations=[makes])[0]["recorded"] == {}


def test_names_that_cannot_be_made(recorded):
    with pytest.raises(ConfigError, match=r"has no record b\.json; it has a\.json"):
        recorded([source("a")], names=["b.json"])
    with pytest.raises(ConfigError, match=r"no command makes a\.json yet"):
        recorded([{"file": "a.json", "command": None}], names=["a.json"])


def test_commands_of_the_page_write_where_records_are_looked_for():
    for found in (found for one in page.read(ROOT)[1] for found in one.section.sources if found.command):
        assert found.command.endswith(f"--output results/{found.file}")
    assert [record.gpus_of(c) for c in ("bench --num_gpus 4", "compare ds_configs/gpu2/*.json", "x")] == [4, 2, 1]
