"""A scoring job whose rank 0 is killed within a line, and one that goes on: the file of an undisturbed run."""

import json
import subprocess

import pytest

from ds_ring.process.launcher import reserved_port
from tests.helpers.launching import ROOT, deepspeed, environment, last_line, launcher
from tests.helpers.limits import HANG_S

pytestmark = pytest.mark.launch

KILLED_WITHIN_LINE_4 = """
import os, signal, sys
sys.path.insert(0, {root!r})
from ds_ring.cli import score, scores_file

whole, lines = scores_file.ScoresFile._write, []

def cut(file, line):
    lines.append(line)
    if len(lines) == 4:
        whole(file, line[:20])
        os.kill(os.getpid(), signal.SIGKILL)
    whole(file, line)

scores_file.ScoresFile._write = cut
score.main()
"""


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    file = tmp_path_factory.mktemp("documents") / "in.jsonl"
    text = (ROOT / "ds_ring" / "parallel" / "layout.py").read_text()
    lines = [{"id": f"d{n}", "text": text[9 * n : 9 * n + 60 + 37 * n]} for n in range(9)]
    lines.append({"id": "long", "input_ids": [1] * 501})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_a_killed_run_goes_on_and_gives_the_same_bytes(llama, documents, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED_WITHIN_LINE_4.format(root=str(ROOT)))
    options = ["--model", llama, "--dtype", "fp32", "--ring-degree", 2, "--micro-batch-size", 2, "--max-length", 500]
    options += ["--documents", documents, "--per-token", "--entropy", "--scores"]
    done = deepspeed(2, "launch/score.py", *options, tmp_path / "whole.jsonl")
    totals, whole = last_line(done), (tmp_path / "whole.jsonl").read_bytes()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [line["id"] for line in lines] == [*(f"d{n}" for n in range(9)), "long"]
    assert "document long is left out: it has 501 tokens, more than max_length=500; raise --max-length" in done.stderr
    assert (totals["documents"], totals["too_long"], totals["scored"]) == (
        10,
        1,
        sum(len(x["ranks"]) for x in lines[:9]),
    )

    cut = tmp_path / "cut.jsonl"
    with reserved_port() as port:
        command = [*launcher(2, port), script, *options, cut]
        killed = subprocess.run(
            [str(word) for word in command], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=HANG_S
        )
    assert killed.returncode != 0, killed.stderr[-2000:]
    left = cut.read_bytes()
    assert left.count(b"\n") == 3
    assert not left.endswith(b"\n")
    done = deepspeed(2, "launch/score.py", *options, cut, "--resume")
    assert cut.read_bytes() == whole
    assert "3 of 10 documents have their lines already" in done.stderr
    assert last_line(done)["nll"] == totals["nll"]
