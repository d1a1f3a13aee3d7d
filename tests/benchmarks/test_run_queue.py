"""The launches of a comparison, and what becomes of those that fail or are interrupted."""

from pathlib import Path

import pytest

from benchmarks.layouts import compare, rank_rows
from benchmarks.reports import comparison_table
from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError, DsRingError, LaunchError, OutOfMemory, UnsupportedModelError
from tests.helpers.comparison_rows import both_lengths, row, run_all, timed


def test_a_failing_layout_takes_neither_the_others_results_with_it_nor_its_own(two_layouts):
    comparison, outcomes, logs = two_layouts
    outcomes["ring4"] = [row("ring4", 1.0, length=500), DsRingError("crashed")]
    outcomes["tp2_pp2"] = [row("tp2_pp2", 1.0)]
    found = run_all(comparison, logs)
    assert [(r["config_file"], r["length"]) for r in found.rows] == [("ring4.json", 500), ("tp2_pp2.json", 1000)]
    assert found.unfit == []
    assert found.failures == [{"layout": "ring4", "implementation": "ds_ring", "reason": "crashed"}]


def test_on_gpus_layouts_share_a_launch(two_layouts, monkeypatch):
    comparison, outcomes, logs = two_layouts
    outcomes |= {"ring4": both_lengths("ring4"), "tp2_pp2": both_lengths("tp2_pp2")}
    apart = run_all(comparison, logs)
    assert outcomes["launches"] == [["ring4"], ["tp2_pp2"]]
    monkeypatch.setattr(compare.launcher, "gpu_count", lambda: 4)
    assert run_all(comparison, logs).rows == apart.rows
    assert outcomes["launches"][2:] == [["ring4", "tp2_pp2"]]


def test_other_implementations_and_other_numbers_of_ranks_are_launched_apart(two_layouts, monkeypatch):
    comparison, outcomes, logs = two_layouts
    monkeypatch.setattr(compare.launcher, "gpu_count", lambda: 4)
    file, run = comparison.runs[0]
    one, tensor = RunConfig.load(run, ring_degree=1), RunConfig.load(run, ring_degree=1, tp_size=4)
    baseline = RunConfig.load(run, implementation="deepspeed_ulysses", ring_degree=1, ulysses_degree=4)
    others = [(file.with_stem(name), other) for name, other in (("deepspeed_ulysses4", baseline), ("tp4", tensor))]
    runs = [(file.with_stem("single"), one), *comparison.runs, *others]
    outcomes |= {name: both_lengths(name) for name in ("single", "ring4", "tp2_pp2", "deepspeed_ulysses4", "tp4")}
    advanced = []
    found = compare.run_all(compare.Comparison.checked(runs), logs, lambda: advanced.append(1), lambda text: None)
    assert outcomes["launches"] == [["single"], ["ring4", "tp2_pp2"], ["deepspeed_ulysses4"], ["tp4"]]
    assert len(advanced) == len(comparison.lengths) + len(runs)
    assert [r["layout"] for r in found.rows[::2]] == ["single", "ring4", "tp2_pp2", "deepspeed_ulysses4", "tp4"]


def test_who_fails_after_others_is_tried_first_of_a_launch(two_layouts, monkeypatch):
    comparison, outcomes, logs = two_layouts
    monkeypatch.setattr(compare.launcher, "gpu_count", lambda: 4)
    comparison = compare.Comparison.checked(
        [*comparison.runs, (Path("tp4.json"), RunConfig.load(comparison.runs[1][1], tp_size=4, pp_size=1))]
    )
    outcomes["ring4"] = both_lengths("ring4")
    outcomes["tp2_pp2"] = [row("tp2_pp2", 1.0, length=500), OutOfMemory("out of memory on rank 1")]
    outcomes["tp4"] = both_lengths("tp4")
    found = run_all(comparison, logs)
    assert outcomes["launches"] == [["ring4", "tp2_pp2", "tp4"], ["tp2_pp2", "tp4"], ["tp4"]]
    assert [(r["layout"], r["length"]) for r in found.rows] == [
        ("ring4", 500), ("ring4", 1000), ("tp2_pp2", 500), ("tp4", 500), ("tp4", 1000)
    ]  # fmt: skip
    assert [(what["layout"], what["length"]) for what in found.unfit] == [("tp2_pp2", 1000)]
    assert found.failures == []


def test_a_launch_that_fails_at_its_end_is_a_failure_and_loses_no_row(two_layouts, monkeypatch):
    comparison, outcomes, logs = two_layouts
    monkeypatch.setattr(compare.launcher, "gpu_count", lambda: 4)
    outcomes |= {"ring4": both_lengths("ring4"), "tp2_pp2": [*both_lengths("tp2_pp2"), DsRingError("hung up")]}
    found = run_all(comparison, logs)
    assert len(found.rows) == 4
    assert [(failure["layout"], failure["reason"]) for failure in found.failures] == [("tp2_pp2", "hung up")]


@pytest.mark.parametrize("gpus", [0, 4])
def test_the_second_half_runs_the_fastest_in_reverse_order_and_the_means_count(two_layouts, gpus, monkeypatch):
    comparison, outcomes, logs = two_layouts
    monkeypatch.setattr(compare.launcher, "gpu_count", lambda: gpus)
    outcomes["ring4"] = [timed("ring4", 100.0, size=1), timed("ring4", 99.0, size=2)]
    outcomes["tp2_pp2"] = [timed("tp2_pp2", 120.0, size=1), timed("tp2_pp2", 130.0, size=2)]
    costs = {"comm_exposed_ms": 1.09, "comm_alone_ms": 7.0, "muted_power_w": 600.0}
    outcomes["ring4.back2"] = [timed("ring4", 109.0, size=2, clock=1200.0) | costs]
    outcomes["tp2_pp2.back1"] = [timed("tp2_pp2", 122.0, size=1)]
    runs = [(file, RunConfig.load(run, micro_batch_sizes=(1, 2), sweep=())) for file, run in comparison.runs]
    comparison, advanced = compare.Comparison(runs, there_and_back=True), []
    found = compare.run_all(comparison, logs, lambda: advanced.append(1), lambda text: None)
    back = ["tp2_pp2.back1", "ring4.back2"]
    first_half = ["ring4", "tp2_pp2"]
    assert outcomes["launches"] == ([first_half, back] if gpus else [[name] for name in (*first_half, *back)])
    assert len(advanced) == comparison.steps
    first, second = (RunConfig.load(logs / f"ring4{way}.config.json") for way in ("", ".back2"))
    assert (first.micro_batch_sizes, first.lengths, first.benchmark.speed_only) == ([1, 2], [1000], True)
    assert (second.micro_batch_sizes, second.lengths, second.benchmark.speed_only) == ([2], [1000], False)
    assert [(r["layout"], r["micro_batch"], round(r["step_ms"], 6)) for r in found.rows] == [
        ("ring4", 1, 100.0), ("ring4", 2, 104.0), ("tp2_pp2", 1, 121.0), ("tp2_pp2", 2, 130.0)
    ]  # fmt: skip
    ring = found.rows[1]
    assert (ring["ways_ms"], ring["step_samples_ms"]) == ("99.00 109.00", "98.00 100.00 108.00 110.00")
    assert ring["sm_clock_mhz"] == 1250.0
    assert ring["step_spread"] == pytest.approx(12 / 104)
    assert ring["tps"] == pytest.approx(4e6 / 104.0) == pytest.approx(4 * ring["tps_per_gpu"])
    assert ring["tpot_ms"] == pytest.approx(4e3 / ring["tps"])
    assert ring["comm_exposed_ms"] == pytest.approx(1.04)  # the part of the mean that it was of the way back
    assert (ring["comm_alone_ms"], ring["muted_power_w"]) == (7.0, 600.0)
    assert found.rows[0]["comm_exposed_ms"] is None
    # Another size may look faster now that its own mean is not known.
    assert [r["micro_batch"] for r in rank_rows.document(comparison, rank_rows.add_ratios(found.rows))["rows"]] == [
        2,
        1,
    ]


def test_what_fails_in_the_second_half_keeps_its_figure_and_is_a_failure(two_layouts):
    comparison, outcomes, logs = two_layouts
    outcomes |= {name: [timed(name, 100.0, length=500), timed(name, 200.0)] for name in ("ring4", "tp2_pp2")}
    outcomes["ring4.back1"] = [timed("ring4", 102.0, length=500), DsRingError("hung up")]
    outcomes["tp2_pp2.back1"] = outcomes["tp2_pp2"]
    found = run_all(compare.Comparison(comparison.runs, there_and_back=True), logs)
    assert [(r["layout"], round(r["step_ms"], 6), "ways_ms" in r) for r in found.rows] == [
        ("ring4", 101.0, True), ("ring4", 200.0, False), ("tp2_pp2", 100.0, True), ("tp2_pp2", 200.0, True)
    ]  # fmt: skip
    assert [what["reason"] for what in found.failures] == ["on the way back: hung up"]


def test_what_did_not_fit_is_what_has_no_row(two_layouts):
    comparison, outcomes, logs = two_layouts
    outcomes["ring4"] = [row("ring4", 1.0, length=500), OutOfMemory("out of memory on rank 1")]
    outcomes["tp2_pp2"] = [OutOfMemory("out of memory on rank 0")]
    found = run_all(comparison, logs)
    assert [r["length"] for r in found.rows] == [500]
    assert [(what["layout"], what["length"]) for what in found.unfit] == [
        ("ring4", 1000), ("tp2_pp2", 500), ("tp2_pp2", 1000)
    ]  # fmt: skip
    assert found.failures == []


def test_a_sweep_over_micro_batches_goes_on_after_what_does_not_fit(two_layouts):
    comparison, outcomes, logs = two_layouts
    comparison = compare.Comparison.make(
        [str(file) for file, _ in comparison.runs], {"sweep": (500,), "micro_batch_sizes": (4, 1, 2)}
    )
    lack = OutOfMemory("out of memory on rank 1")

    def timed(size, length, tps):
        return row("ring4", tps, length=length, ring_degree=4) | {"micro_batch": size}

    outcomes["ring4"] = [timed(1, 500, 3.0), timed(1, 1000, 4.0), timed(2, 500, 5.0), lack]
    outcomes["ring4.2"] = [timed(4, 500, 2.0)]
    outcomes["tp2_pp2"] = [row("tp2_pp2", 2.0, length=500, tp_size=2, pp_size=2), lack]
    outcomes["tp2_pp2.2"] = [lack]
    found = run_all(comparison, logs)
    assert RunConfig.load(logs / "ring4.2.config.json").micro_batch_sizes == [4]
    assert RunConfig.load(logs / "ring4.2.config.json").lengths == [500]
    assert [(u["layout"], u["micro_batch"], u["length"]) for u in found.unfit] == [
        ("ring4", 2, 1000), ("ring4", 4, 1000), ("tp2_pp2", 1, 1000), ("tp2_pp2", 2, 1000), ("tp2_pp2", 4, 1000),
        ("tp2_pp2", 2, 500), ("tp2_pp2", 4, 500),
    ]  # fmt: skip
    failed = found.all_failures
    assert failed == [{"layout": "tp2_pp2", "implementation": "ds_ring", "reason": "out of memory at L = 1000"}]
    document = rank_rows.document(comparison, rank_rows.add_ratios(found.rows), failed)
    assert [(r["layout"], r["length"], r["micro_batch"], r["micro_batches"]) for r in document["sweep"]] == [
        ("ring4", 500, 2, [1, 2, 4]), ("ring4", 1000, 1, [1]), ("tp2_pp2", 500, 1, [1])
    ]  # fmt: skip
    assert [r["vs_baseline"] for r in document["sweep"]] == [2.5, None, 1.0]
    assert len(document["micro_batches"]) == 5
    _, cells = comparison_table.table(document["rows"], failed)
    assert [row[:2] for row in cells] == [["ring4", "1 of 1"], ["tp2_pp2", "failed: out of memory at L = 1000"]]


def test_a_baseline_that_fails_is_a_line_of_the_table_and_no_failure_of_ours(two_layouts):
    comparison, outcomes, logs = two_layouts
    ring, run = comparison.runs[0]
    baseline = RunConfig.load(run, implementation="deepspeed_ulysses", ring_degree=1, ulysses_degree=4)
    comparison = compare.Comparison.checked([(ring, run), (ring.with_stem("deepspeed_ulysses4"), baseline)])
    outcomes["ring4"] = [row("ring4", 1.0)]
    for error, reason in (
        (LaunchError("a long story\nof many lines", "RuntimeError: no kernel"), "RuntimeError: no kernel"),
        (UnsupportedModelError("Model asks for s_aux"), "Model asks for s_aux"),
        (ConfigError("it is not installed; pip install it"), "it is not installed; pip install it"),
    ):
        outcomes["deepspeed_ulysses4"] = [error]
        found = run_all(comparison, logs)
        assert [r["layout"] for r in found.rows] == ["ring4"]
        assert rank_rows.ours(found.all_failures) == []
        (line,) = found.all_failures
        assert (line["layout"], line["reason"]) == ("deepspeed_ulysses4", reason)
        assert comparison_table.table(found.rows, [line])[1][1][:2] == ["deepspeed_ulysses4", f"failed: {reason}"]


def test_lengths_at_which_the_reference_does_not_fit_are_unchecked(two_layouts, monkeypatch):
    comparison, outcomes, logs = two_layouts

    def run_module(module, options, *, log, report):
        lengths = options[options.index("--length") + 1 : options.index("--output")]
        outputs = options[options.index("--output") + 1 :][: len(lengths)]
        assert lengths == ["500", "1000"]
        Path(outputs[0]).touch()
        raise OutOfMemory("out of memory on rank 0")

    monkeypatch.setattr(compare.launcher, "run_module", run_module)
    outcomes |= {"ring4": [row("ring4", 1.0, length=500), row("ring4", 1.0) | {"max_rel_error": None}]}
    found = run_all(comparison, logs)
    assert found.unchecked == [1000]
    rows = rank_rows.add_ratios(found.rows, unchecked=found.unchecked)
    assert [r["agrees"] for r in rows] == [True, None]
    assert rank_rows.disagreeing(rows) == []


def test_an_earlier_result_does_not_pass_for_a_run_that_wrote_none(two_layouts):
    comparison, outcomes, logs = two_layouts
    outcomes |= {"ring4": [row("ring4", 1.0)], "tp2_pp2": [row("tp2_pp2", 1.0)]}
    assert len(run_all(comparison, logs).rows) == 2
    outcomes["ring4"] = []
    found = run_all(comparison, logs)
    assert [r["layout"] for r in found.rows] == ["tp2_pp2"]
    assert [failure["layout"] for failure in found.failures] == ["ring4"]
