"""Kill trials: what is planned, how a result file is read, and what breaks a bar."""

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.cli import kill_trials
from benchmarks.faults import trials
from benchmarks.faults.judge import BARS, broken, summary
from benchmarks.faults.plan import plan, targets
from benchmarks.faults.run import Inputs, Run, state_of
from ds_ring.errors import LaunchError
from ds_ring.utils.output_file import write_atomically
from ds_ring.utils.results import write_partial

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


def run_in(folder):
    """A run that has started nothing, with a result of the run before."""
    run = object.__new__(Run)
    run.folder, run.output = folder, folder / "out.json"
    run.output.write_text("the one before")
    run.inode = run.output.stat().st_ino
    (folder / "stderr").write_text("")
    return run


def test_writing_begins_with_the_unfinished_file_and_lasts(tmp_path, monkeypatch):
    run, seen = run_in(tmp_path), []
    monkeypatch.setattr("os.replace", lambda *names: (seen.append(run.writes()), Path(names[0]).rename(names[1])))
    assert not run.writes()
    write_atomically(run.output, "a new one")
    assert seen == [True]
    assert run.output.read_text() == "a new one"
    assert run.writes()


def test_rows_so_far_are_writing(tmp_path):
    run = run_in(tmp_path)
    write_partial(run.output, {"rows": []})
    assert [run.writes(), run.output.read_text()] == [True, "the one before"]


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


class OneHost:
    """This machine as it is."""

    names = ("here",)

    def command(self, name, words, folder):
        return words


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import time; time.sleep(3600)", "an undisturbed run of ds-ring bench took longer than 1 s"),
        ("import sys; sys.exit('a\\nb')", "an undisturbed run of ds-ring bench ended with exit code 1: a / b"),
    ],
    ids=["late", "failed"],
)
def test_a_reference_that_does_not_get_to_its_end_is_one_line(program, said, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(trials, "START_S", 1.0)
    monkeypatch.setattr(trials, "command_line", lambda *_: [sys.executable, "-c", program])
    inputs = Inputs(tmp_path, tmp_path, 1, 1, {})
    monkeypatch.setattr(kill_trials, "_run", lambda _: trials.reference("ds-ring bench", OneHost(), inputs, tmp_path))
    monkeypatch.setattr(sys, "argv", ["kill_trials.py", "--model", "DIR", "--output", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit) as end:
        kill_trials.main()
    assert (end.value.code, capsys.readouterr().err) == (1, f"failed: {said}\n")


def test_what_a_trial_starts_dies_of_an_interrupt_also_in_a_background_job(monkeypatch, tmp_path):
    kill_itself = [sys.executable, "-c", "import os; os.kill(os.getpid(), 2)"]
    ends = []

    def run(_):
        ends.append(subprocess.run(kill_itself).returncode)
        raise LaunchError("over", "over")

    monkeypatch.setattr(kill_trials, "_run", run)
    monkeypatch.setattr(sys, "argv", ["kill_trials.py", "--model", "DIR", "--output", str(tmp_path / "out.json")])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        ends.append(subprocess.run(kill_itself).returncode)
        with pytest.raises(SystemExit):
            kill_trials.main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert ends == [0, -signal.SIGINT]
