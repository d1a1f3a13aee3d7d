"""Kill trials: what is planned, how a result file is read, and what breaks a bar."""

import json
from collections import Counter

import pytest

from benchmarks.faults.judge import BARS, broken, summary
from benchmarks.faults.plan import plan, targets
from benchmarks.faults.run import Run, state_of
from ds_ring.utils import output_file

FINE = {"command": "ds-ring score", "left": [], "exit_code": 1, "result": "previous", "hit": True, "gone_s": 2.0}


def test_every_combination_comes_before_any_comes_twice():
    trials = plan(400, 3, [1, 2])
    kinds = Counter((t.hosts, t.command, t.target, t.signal, t.phase) for t in trials)
    assert len(trials) == 400
    assert set(kinds.values()) <= {1, 2}
    first = {(t.hosts, t.command, t.target, t.signal, t.phase) for t in trials[: len(kinds)]}
    assert first == set(kinds)
    assert plan(400, 3, [1, 2]) == trials != plan(400, 4, [1, 2])


def test_what_a_run_does_not_have_is_no_target():
    assert targets(1, "deepspeed score") == ["rank", "launch", "runner"]
    assert targets(2, "ds-ring bench") == ["rank", "launch", "runner", "pdsh", "ours"]
    assert not [t for t in plan(300, 0, [1, 2]) if (t.target, t.signal) == ("ours", "STOP")]


@pytest.mark.parametrize(
    ("text", "state"),
    [
        (None, "lost"),
        ("the one before", "previous"),
        ('{"documents": [{"tok', "not JSON"),
        (json.dumps({"documents": [{"tokens": 3, "nll": 1.0000000001}]}), "complete"),
        (json.dumps({"documents": [{"tokens": 3, "nll": 1.1}]}), "wrong"),
        (json.dumps({"documents": []}), "wrong"),
        (json.dumps({"documents": [{"tokens": 3, "nll": 1.0}], "status": "partial"}), "status partial"),
    ],
)
def test_the_state_of_a_result(text, state, tmp_path):
    output = tmp_path / "out.json"
    if text is not None:
        output.write_text(text)
    assert state_of(output, "the one before", [[3, 1.0]]) == state


def test_a_run_writes_while_a_file_beside_its_result_is_unfinished(tmp_path, monkeypatch):
    output, seen = tmp_path / "out.json", []
    output.write_text("the one before")
    run = object.__new__(Run)
    run.folder, run.output, run._inode = tmp_path, output, output.stat().st_ino
    assert not run.writes()
    monkeypatch.setattr(output_file, "_write_all", lambda *_: seen.append(run.writes()))
    output_file.write_atomically(output, "the next")
    assert seen == [True]


@pytest.mark.parametrize(
    ("change", "bars"),
    [
        ({}, []),
        ({"exit_code": 0, "result": "complete"}, []),
        ({"exit_code": 0}, [BARS[1]]),
        ({"exit_code": 0, "command": "deepspeed score"}, []),
        ({"left": ["python"], "gone_s": None}, [BARS[0]]),
        ({"result": "lost"}, [BARS[2]]),
        ({"result": "wrong", "exit_code": 0}, [BARS[1], BARS[2]]),
    ],
)
def test_what_breaks_a_bar(change, bars):
    assert broken(FINE | change) == bars
    counts = summary([FINE, FINE | change])
    assert {bar: counts[bar] for bar in BARS} == {bar: int(bar in bars) for bar in BARS}
    assert (counts["trials"], counts["hit"], counts["longest_s"]) == (2, 2, 2.0)
