"""Comparisons: which layouts can be compared, the ratios of their rows, and the documents they make."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.layouts import checkpoint, compare, rank_rows
from benchmarks.reports import comparison_table, plots
from benchmarks.reports.tables import name_of
from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError, OutputError
from ds_ring.utils import output_file, results
from tests.helpers.comparison_rows import row
from tests.helpers.limits import HANG_S
from tests.helpers.pages import tables


def test_modes_are_compared_among_themselves(rows):
    short = [
        row("tp4", 1000.0, mode="prefill_only", tp_size=4),
        row("ring4", 1250.0, mode="prefill_only", ring_degree=4),
    ]
    found = rank_rows.add_ratios(rows + short)
    assert found[: len(rows)] == rank_rows.add_ratios(rows)
    assert found[-1]["vs_baseline"] == pytest.approx(1.25)
    assert found[-1]["vs_dp"] is None
    assert [name_of(r) for r in found[-3:]] == ["ring4", "tp4 (prefill only)", "ring4 (prefill only)"]


@pytest.fixture
def rows():
    return [
        row("dp4", 1000.0, dp_size=4),
        row("tp2_pp2", 800.0, tp_size=2, pp_size=2),
        row("tp4", 700.0, tp_size=4),
        row("ring4", 960.0, ring_degree=4),
        row("tp2_pp2", 100.0, length=500, tp_size=2, pp_size=2),
        row("ring4", 150.0, length=500, ring_degree=4),
    ]


def test_gains_refer_to_the_fastest_baseline_and_to_dp_at_the_same_length(rows):
    ring, short = (r for r in rank_rows.add_ratios(rows) if r["layout"] == "ring4")
    assert ring["vs_baseline"] == pytest.approx(1.2)
    assert ring["vs_dp"] == pytest.approx(0.96)
    assert short["vs_baseline"] == pytest.approx(1.5)
    assert short["vs_dp"] is None


def test_a_baseline_can_be_named(rows):
    ring = next(r for r in rank_rows.add_ratios(rows, baseline="tp4") if r["layout"] == "ring4")
    assert ring["vs_baseline"] == pytest.approx(960 / 700)


def test_a_baseline_that_is_no_layout_is_refused_before_any_work(tmp_path):
    files = [str(compare.launcher.ROOT / "ds_configs" / "cpu4" / f"{name}.json") for name in ("ring4", "tp2_pp2")]
    output = tmp_path / "found.json"
    command = [sys.executable, "launch/compare.py", "--layouts", *files, "--output", str(output)]
    done = subprocess.run(
        [*command, "--baseline", "tp4"], cwd=compare.launcher.ROOT, capture_output=True, text=True, timeout=HANG_S,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == "error: baseline=tp4 is none of the layouts; try ring4 or tp2_pp2"
    assert list(tmp_path.iterdir()) == []
    compare.Comparison.make(files, {}).check_baseline("ring4")


def test_mfu_of_all_rows_refers_to_one_peak():
    found = rank_rows.add_ratios(
        [row("dp4", 1000.0, peak=1e6, dp_size=4), row("ring4", 1000.0, peak=2e6, ring_degree=4)]
    )
    assert found[0]["mfu"] == pytest.approx(found[1]["mfu"])


@pytest.mark.parametrize(
    ("dtype", "error", "agrees"),
    [("fp32", 9e-6, True), ("fp32", 2e-5, False), ("fp16", 9e-3, True), ("fp16", 1.1e-2, False), ("fp32", None, False)],
)
def test_a_row_agrees_only_within_its_dtypes_tolerance(dtype, error, agrees):
    one = row("ring4", 1.0, dtype=dtype, error=error or 0.0, ring_degree=4)
    if error is None:
        one |= {"max_rel_error": None, "rel_error": None}
    assert rank_rows.add_ratios([one])[0]["agrees"] is agrees


def test_document_separates_the_table_from_the_sweep(rows):
    comparison = compare.Comparison([("a.json", RunConfig.load({}, max_length=1000, sweep=(500,)))])
    document = rank_rows.document(comparison, rank_rows.add_ratios(rows))
    assert [r["layout"] for r in document["rows"]] == ["dp4", "tp2_pp2", "tp4", "ring4"]
    assert len(document["sweep"]) == len(rows)
    assert comparison.lengths == [500, 1000]
    rows[-1]["max_rel_error"] = 1.0
    assert rank_rows.disagreeing(rank_rows.add_ratios(rows)) == ["ring4 at L = 500"]


def test_every_set_of_layouts_in_the_repository_compares(monkeypatch):
    for gpus, folder in [(0, "cpu4"), (1, "gpu1"), (2, "gpu2"), (3, "gpu2"), (4, "gpu4"), (8, "gpu8"), (16, "gpu8")]:
        monkeypatch.setattr(compare.launcher, "gpu_count", lambda n=gpus: n)
        files = compare.default_layouts()
        assert files
        assert all(f"/{folder}/" in f for f in files)
        comparison = compare.Comparison.make(files, {})
        labels = [run.label for _, run in comparison.runs]
        assert labels == [file.stem for file, _ in comparison.runs]


def test_layouts_with_different_workloads_are_refused(tmp_path):
    files = []
    for name, batch in (("a", 4), ("b", 8)):
        files.append(str(tmp_path / f"{name}.json"))
        section = {"model": "checkpoints/small", "parallel": {"ring_degree": 2}, "workload": {"batch_size": batch}}
        (tmp_path / f"{name}.json").write_text(json.dumps({"dtype": "fp32", "ds_ring": section}))
    with pytest.raises(ConfigError, match=r"b\.json differs from .*a\.json in workload or dtype"):
        compare.Comparison.make(files, {})
    with pytest.raises(ConfigError, match=r"a\.json and .*b\.json are both ring2: rows of them could not be told"):
        compare.Comparison.make(files, {"batch_size": 4})


def test_micro_batches_may_differ(tmp_path):
    files = []
    for size, degrees in ((1, {"dp_size": 2}), (2, {"ring_degree": 2})):
        files.append(str(tmp_path / f"{size}.json"))
        section = {"model": "checkpoints/small", "parallel": degrees, "workload": {"micro_batch_size": size}}
        Path(files[-1]).write_text(json.dumps({"dtype": "fp32", "ds_ring": section}))
    assert [run.workload.micro_batch_size for _, run in compare.Comparison.make(files, {"batch_size": 4}).runs] == [
        1,
        2,
    ]
    heads, cells = comparison_table.table([row("dp2", 900), row("ring2", 1000) | {"micro_batch": 2}])
    assert heads[1] == "micro-batch"
    assert [c[1] for c in cells] == ["1", "2"]


def test_ways_of_one_ring_have_names_of_their_own():
    variants = [RunConfig.load({}, ring_degree=2, ring_variant=name) for name in ("auto", "pass_kv", "gather_kv")]
    assert [run.label for run in variants] == ["ring2", "ring2_pass_kv", "ring2_gather_kv"]
    assert RunConfig.load({}, ring_degree=2, ring_impl="contiguous").label == "ring2_contiguous"
    assert RunConfig.load({}, dp_size=2, ring_variant="pass_kv").label == "dp2"


def test_the_report_shows_every_layout_and_the_command(rows):
    comparison = compare.Comparison([("a.json", RunConfig.load({}, max_length=1000, sweep=(500,)))])
    document = results.provenance() | rank_rows.document(comparison, rank_rows.add_ratios(rows))
    text = comparison_table.markdown(document)
    layouts, by_length = tables(text)
    ring = next(row for row in layouts if row["layout"] == "ring4")
    assert [ring["TPS (tok/s)"], ring["vs TP/PP"], ring["vs DP"]] == ["960", "+20.0 %", "-4.0 %"]
    assert by_length[1] == {"layout": "tp2_pp2", "500": "100", "1000": "800"}
    assert document["command"] in text
    assert comparison_table.terminal_table(document["rows"]).row_count == 4


def test_the_plot_is_a_picture(rows, tmp_path):
    comparison = compare.Comparison([("a.json", RunConfig.load({}, max_length=1000, sweep=(500,)))])
    plots.draw(rank_rows.document(comparison, rank_rows.add_ratios(rows)), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_write_leaves_the_previous_result(tmp_path, monkeypatch):
    file = tmp_path / "result.json"
    results.write_json(file, {"rows": [1]})

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output_file.os, "replace", full_disk)
    with pytest.raises(OutputError, match=f"^{file} could not be written: No space left on device$"):
        results.write_json(file, {"rows": [2]})
    assert results.read_json(file) == {"rows": [1]}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_baseline_that_is_wrong_is_shown_and_no_failure_of_ours():
    wrong = row("deepspeed_ulysses4", 1.0, error=1.0, ulysses_degree=4) | {"implementation": "deepspeed_ulysses"}
    found = rank_rows.add_ratios([wrong])
    assert found[0]["agrees"] is False
    assert rank_rows.disagreeing(found) == []
    assert plots.kind(wrong) == "baseline"


def test_context_parallel_is_refused_where_there_are_no_gpus(monkeypatch):
    folder = compare.launcher.ROOT / "ds_configs"
    files = [str(folder / "gpu2" / "ring2.json"), *sorted(map(str, (folder / "baselines2").glob("*.json")))]
    monkeypatch.setattr(compare.launcher, "gpu_count", lambda: 0)
    with pytest.raises(ConfigError, match="implementation=context_parallel: PyTorch has it for GPUs alone"):
        compare.Comparison.make(files, {})
    monkeypatch.setattr(compare.launcher, "gpu_count", lambda: 2)
    comparison = compare.Comparison.make(files, {})
    assert [run.label for _, run in comparison.runs] == [
        "ring2", "context_parallel2", "deepspeed_ulysses2", "yunchang_ring2", "yunchang_ulysses2",
    ]  # fmt: skip


def test_an_interrupted_checkpoint_is_not_left_half_made(tmp_path, monkeypatch):
    run = RunConfig.load({}, model=str(tmp_path / "checkpoints" / "small"))

    def interrupted(source, directory, **_):
        directory.mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "make_checkpoint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.ensure(run, lambda text: None)
    assert list((tmp_path / "checkpoints").iterdir()) == []
    checkpoint.ensure(run, lambda text: None)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["small"]
    assert (tmp_path / "checkpoints" / "small" / "config.json").is_file()
