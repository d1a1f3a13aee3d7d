"""One sequence in every layout: the layouts that are run, and their times."""

import pytest

from benchmarks.layouts import compare, latency
from benchmarks.layouts.run_queue import QueueResults
from benchmarks.reports import latency_table, plots
from ds_ring.errors import ConfigError
from tests.helpers.comparison_rows import timed_row

FILES = [
    f"{compare.launcher.ROOT}/ds_configs/gpu4/{name}.json"
    for name in ("dp4", "tp4", "tp2_pp2", "ring4", "ulysses2_ring2")
]


@pytest.fixture
def document():
    found = QueueResults(
        rows=[
            timed_row("single", 10000, 2.0, gpus=1),
            timed_row("ring4", 10000, 0.6, ring_degree=4),
            timed_row("ring4", 131072, 9.0),
        ],
        unfit=[{"layout": "single", "length": 131072, "mode": "full"}],
    )
    comparison = latency.comparison(FILES, [10000, 131072], {})
    return latency.document(comparison, found, latency.add_ratios(found.rows))


def test_one_rank_alone_comes_first_and_data_parallelism_adds_nothing():
    comparison = latency.comparison(FILES, [131072, 10000], {"repeats": 2})
    assert [file.stem for file, _ in comparison.runs] == ["single", "tp4", "tp2_pp2", "ring4", "ulysses2_ring2"]
    assert [run.label for _, run in comparison.runs] == [file.stem for file, _ in comparison.runs]
    work = comparison.first.workload
    assert (comparison.lengths, work.batch_size, work.micro_batch_size) == ([10000, 131072], 1, 1)
    assert comparison.first.benchmark.repeats == 2


@pytest.mark.parametrize("option", ["batch_size", "max_length", "dp_size"])
def test_options_that_it_decides_are_refused(option):
    with pytest.raises(ConfigError, match=f"--latency decides --{option.replace('_', '-')}"):
        latency.comparison(FILES, [1000], {option: 2})


def test_impossible_lengths_are_refused():
    with pytest.raises(ConfigError, match="at least 1"):
        latency.comparison(FILES, [0, 1000], {})


def test_every_time_is_also_one_over_one_ranks(document):
    assert latency_table.table(document) == (
        ["layout", "L = 10,000", "L = 131,072"],
        [["single", "2.000", "does not fit"], ["ring4", "0.600 (0.30)", "9.000"]],
    )
    assert [r["vs_one_rank"] for r in document["rows"]] == [1.0, pytest.approx(0.3), None]


def test_it_is_written_down(document, tmp_path):
    origin = {"command": "compare.py --latency 10000", "git": "abc", "date": "today", "versions": {"torch": "2"}}
    made = document | origin
    assert made["command"] in latency_table.markdown(made)
    plots.draw_latency(made, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
