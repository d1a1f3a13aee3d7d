"""What a launched command refuses of its texts before ranks are started."""

from __future__ import annotations

import os
import re

import pytest

from benchmarks.cli import bench_generate
from ds_ring.cli import generate
from ds_ring.cli.inputs import check_read_once
from ds_ring.errors import InputError


@pytest.fixture
def fifo(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    return str(tmp_path / "fifo")


@pytest.mark.parametrize("command", [generate, bench_generate], ids=["generate", "bench-generate"])
def test_a_text_that_is_given_once_is_refused_for_several_ranks(command, fifo):
    args = command.make_parser().parse_args(["--prompt-file", fifo, "--ring-degree", "4"])
    words = f"{fifo} is no regular file: it gives its text once, and 4 ranks would read it; write the text to a file"
    with pytest.raises(InputError, match=f"^{re.escape(words)}$"):
        command.check(args, 4)


def test_one_rank_reads_it_and_a_rank_of_several_knows_how_many_they_are(fifo, monkeypatch, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    check_read_once([fifo], 1)
    check_read_once([fifo], None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_read_once([str(tmp_path / "a.txt"), str(tmp_path), str(tmp_path / "none")], None)
    with pytest.raises(InputError, match="and 2 ranks would read it"):
        check_read_once([fifo], None)
