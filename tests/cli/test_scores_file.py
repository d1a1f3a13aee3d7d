"""The file of --scores: appended to, taken up where it was cut, and in order at the end."""

import errno
import json

import pytest

from ds_ring.cli.scores_file import ScoresFile, check_free
from ds_ring.errors import InputError, OutputError

IDS = ["a", "b", 2]


def entry(index, tokens=3, log_likelihood=-1.5):
    whole = {"tokens": tokens, "scored": tokens - 1, "log_likelihood": log_likelihood, "too_long": None}
    return {"id": IDS[index], "index": index, **whole}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_come_as_documents_finish_and_are_put_in_order(tmp_path):
    path = tmp_path / "new" / "out.jsonl"
    file = ScoresFile(str(path), "job", IDS, resume=False)
    file.append([entry(2), entry(0, tokens=5, log_likelihood=-0.25)])
    assert [line["index"] for line in lines(path)] == [2, 0]
    file.append([{**entry(1), "too_long": "it is", "tokens": None, "scored": 0, "log_likelihood": None}])
    totals = file.finish()
    assert totals == {"documents": 3, "too_long": 1, "tokens": 8, "scored": 6, "log_likelihood": -1.75}
    assert [line["index"] for line in lines(path)] == [0, 1, 2]
    assert lines(path)[2] == {**entry(2), "job": "job"}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("cut", range(0, 350, 10))
def test_a_run_goes_on_where_it_was_cut_and_gives_the_same_file(cut, tmp_path):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    undisturbed = ScoresFile(str(whole), "job", IDS, resume=False)
    undisturbed.append([entry(2), entry(0), entry(1)])
    path.write_bytes(kept := whole.read_bytes()[:cut])
    undisturbed.finish()
    resumed = ScoresFile(str(path), "job", IDS, resume=True)
    assert resumed.done == set((2, 0, 1)[: kept.count(b"\n")])
    resumed.append([entry(0), entry(1), entry(2)])
    resumed.finish()
    assert path.read_bytes() == whole.read_bytes()


def test_a_finished_file_is_left_as_it_is(tmp_path):
    path = tmp_path / "out.jsonl"
    for resume in (False, True, True):
        file = ScoresFile(str(path), "job", IDS, resume)
        file.append([entry(1), entry(0), entry(2)])
        assert file.finish()["scored"] == 6
        assert [line["index"] for line in lines(path)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("there", "says"),
    [({**entry(0), "job": "other"}, "line 2 is of another job: other documents, another model, layout, dtype or other"),
     ({**entry(0), "id": "x", "job": "job"}, "line 2 is no line of this command's; name another file"),
     ({**entry(0), "index": 3, "job": "job"}, "line 2 is no line of this command's; name another file"),
     ({**entry(1), "job": "job"}, "line 2 is no line of this command's; name another file"),
     ({"index": 0, "job": "job"}, "line 2 is no line of this command's; name another file"),
     ([], "line 2 is no line of this command's; name another file")],
)  # fmt: skip
def test_lines_of_something_else_are_refused_and_left(there, says, tmp_path):
    path = tmp_path / "out.jsonl"
    before = json.dumps({**entry(1), "job": "job"}) + "\n" + json.dumps(there) + "\n"
    path.write_text(before)
    with pytest.raises(InputError) as error:
        ScoresFile(str(path), "job", IDS, resume=True)
    assert str(error.value).startswith(f"--scores {path} {says}")
    assert path.read_text() == before


def test_what_is_there_is_not_overwritten(tmp_path):
    path = tmp_path / "out.jsonl"
    check_free(str(path), resume=False)
    path.write_text("")
    check_free(str(path), resume=False)
    path.write_text("x")
    check_free(str(path), resume=True)
    with pytest.raises(InputError, match=r"out.jsonl is there already: --resume goes on with it; else name another"):
        check_free(str(path), resume=False)


def test_a_full_disk_is_said_and_what_is_there_can_be_resumed(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    file = ScoresFile(str(path), "job", IDS, resume=False)
    file.append([entry(2)])
    whole = file._file

    class Full:
        def write(self, view):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file, "_file", Full())
    with pytest.raises(OutputError, match=r"out.jsonl could not be written: No space left on device; --resume goes on"):
        file.append([entry(0)])
    whole.close()  # as the end of the process does
    assert ScoresFile(str(path), "job", IDS, resume=True).done == {2}


def test_a_file_that_another_run_writes_is_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    first = ScoresFile(str(path), "job", IDS, resume=False)
    first.append([entry(2)])
    with pytest.raises(InputError, match=r"out.jsonl is written by another run; wait for its end"):
        ScoresFile(str(path), "job", IDS, resume=True)
    first.append([entry(0), entry(1)])
    first.finish()
    assert [line["index"] for line in lines(path)] == [0, 1, 2]
    assert ScoresFile(str(path), "job", IDS, resume=True).done == {0, 1, 2}
