"""Files that commands leave: what becomes of devices, FIFOs, links, and of the file that was there before."""

import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ds_ring.errors import ConfigError, OutputError
from ds_ring.process.launcher import ROOT
from ds_ring.utils import results
from ds_ring.utils.output_file import (
    UNFINISHED,
    check_writable,
    is_special,
    partial_of,
    remove_unfinished,
    write_atomically,
)


def test_a_device_is_written_into_and_stays_one():
    check_writable(Path("/dev/null"))
    write_atomically("/dev/null", "text")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(OutputError, match=r"^/dev/full could not be written: No space left on device$"):
        write_atomically("/dev/full", "text")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_a_fifo_is_written_into(tmp_path):
    fifo, read = tmp_path / "fifo", []
    os.mkfifo(fifo)
    check_writable(fifo)
    reader = threading.Thread(target=lambda: read.append(fifo.read_text()))
    reader.start()
    text = "text " * 50_000  # more than a pipe holds
    write_atomically(fifo, text)
    reader.join()
    assert read == [text]
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert list(tmp_path.iterdir()) == [fifo]


@pytest.mark.parametrize("there", [True, False], ids=["a file", "nothing yet"])
def test_a_link_stays_one_and_what_it_leads_to_is_replaced(there, tmp_path):
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    target.parent.mkdir()
    if there:
        target.write_text("before")
        target.chmod(0o640)
    link.symlink_to("folder/target")
    check_writable(link)
    write_atomically(link, "after")
    assert link.readlink() == Path("folder/target")
    assert target.read_text() == "after"
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(target.stat().st_mode) == (0o640 if there else 0o666 & ~mask)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["folder", "link", "target"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("x" * 256, "File name too long"), ("x" * 243 + ".json", "File name too long"), ("folder", "Is a directory"),
        ("loop", "Too many levels of symbolic links"), ("astray", "No such file or directory"),
        ("file/under", "File exists"), ("socket", "No such device or address"), ("", "Is a directory"),
    ],
    ids=lambda text: text[:10],
)  # fmt: skip
def test_what_cannot_be_written_is_found_before(name, why, tmp_path, monkeypatch):
    import socket

    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").touch()
    Path("loop").symlink_to("loop")
    Path("astray").symlink_to("none/none")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("socket")
    before = sorted(Path().iterdir())
    with pytest.raises(OSError, match=why):
        check_writable(Path(name))
    assert sorted(Path().iterdir()) == before
    listener.close()


def test_the_longest_name_can_be_written(tmp_path):
    file = tmp_path / ("x" * (255 - len(".partial.json")) + ".json")
    check_writable(file)
    write_atomically(file, "text")
    write_atomically(partial_of(file), "text")
    assert not is_special(file)


class TestCollect:
    """Rows of a result that is written when it is complete."""

    def test_until_then_the_earlier_result_stays_and_rows_are_beside_it(self, tmp_path):
        output, partial = tmp_path / "out.json", tmp_path / "out.partial.json"
        results.write_complete(output, {"rows": ["before"]})

        def rows():
            yield {"row": 1}
            assert results.read_json(output) == {"rows": ["before"], "status": "complete"}
            assert results.read_json(partial, partial=True) == {"a": 1, "rows": [{"row": 1}], "status": "partial"}
            with pytest.raises(ConfigError, match=r"out\.partial\.json is a partial result: the command that"):
                results.read_json(partial)
            yield {"row": 2}

        whole = {"a": 1, "rows": [{"row": 1}, {"row": 2}], "status": "complete"}
        assert results.collect({"a": 1}, rows(), output) == whole
        assert results.read_json(output) == whole
        assert list(tmp_path.iterdir()) == [output]

    def test_an_error_leaves_both(self, tmp_path):
        output = tmp_path / "out.json"
        results.write_complete(output, {"rows": ["before"]})

        def rows():
            yield {"row": 1}
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            results.collect({}, rows(), output)
        assert results.read_json(output)["rows"] == ["before"]
        assert results.read_json(partial_of(output), partial=True)["rows"] == [{"row": 1}]

    def test_a_full_disk_on_the_way_ends_nothing(self, tmp_path, monkeypatch, caplog):
        def full(path, content):
            raise OutputError(f"{Path(path).name} could not be written: No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(results, "write_atomically", full)
            results.write_partial(tmp_path / "out.json", {"rows": []})
            with pytest.raises(OutputError, match=r"out\.json could not be written"):
                results.write_complete(tmp_path / "out.json", {"rows": []})
        assert "rows so far are not kept: out.partial.json could not be written: No space left" in caplog.text

    def test_no_row_at_all_replaces_nothing(self, tmp_path):
        results.write_complete(tmp_path / "out.json", {"rows": ["before"]})
        assert results.collect({}, [], tmp_path / "out.json") == {"rows": [], "status": "complete"}
        assert results.read_json(tmp_path / "out.json")["rows"] == ["before"]

    def test_a_device_has_nothing_beside_it(self):
        assert results.collect({}, [{"row": 1}], "/dev/null")["status"] == "complete"
        assert not Path("/dev/null.partial.json").exists()

    def test_records_without_a_status_are_complete(self, tmp_path):
        (tmp_path / "old.json").write_text('{"rows": [1]}')
        assert results.read_json(tmp_path / "old.json") == {"rows": [1]}


KILLED = """
import os, sys
os.replace = lambda *names: os.kill(os.getpid(), 9)
from ds_ring.utils.output_file import write_atomically
write_atomically(sys.argv[1], "half")
"""


def test_what_a_killed_process_left_is_removed_and_what_others_write_is_not(tmp_path, monkeypatch):
    output, link = tmp_path / "out.json", tmp_path / "elsewhere" / "link"
    output.write_text("before")
    link.parent.mkdir()
    link.symlink_to(output)
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", KILLED, output], cwd=ROOT)
        assert done.returncode == -signal.SIGKILL
    left = [file for file in tmp_path.iterdir() if file.name.startswith(UNFINISHED)]
    assert [file.read_text() for file in left] == ["half", "half"]
    (number,) = {int(file.name.split(".")[-2]) for file in left[:1]}
    others = [f"{UNFINISHED}other-host.{number}.abc", f"{UNFINISHED}{os.uname().nodename}.{os.getpid()}.abc"]
    others += [f"{UNFINISHED}{os.uname().nodename}.notes", "mine.txt"]
    for name in others:
        (tmp_path / name).write_text("theirs")
    remove_unfinished(link)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*others, "elsewhere", "out.json"])
    assert output.read_text() == "before"


def test_a_process_that_nobody_waited_for_is_gone(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / "out.json"], cwd=ROOT)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert len(list(tmp_path.iterdir())) == 1
    remove_unfinished(tmp_path / "out.json")
    assert list(tmp_path.iterdir()) == []
    process.wait()
