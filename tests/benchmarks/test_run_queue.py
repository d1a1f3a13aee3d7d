"""The launches of a comparison, and what becomes of those that fail or are interrupted."""

import io
from pathlib import Path

import pytest

from benchmarks.cli.compare import work
from benchmarks.layouts import checkpoint, compare, rank_rows
from benchmarks.reports import comparison_table
from ds_ring.cli import options
from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError, DsRingError, LaunchError, OutOfMemory, UnsupportedModelError
from ds_ring.utils import progress, results
from tests.helpers.comparison_rows import row


@pytest.fixture
def two_layouts(tmp_path, monkeypatch):
    """A comparison of ring4 and tp2_pp2 whose launcher does what ``outcomes`` says by layout, and its folder of logs.
    ``outcomes["launches"]`` lists what was launched together."""
    outcomes = {"launches": (launches := [])}

    def launch(script, ranks, options, *, log, report, timeout_s):
        files = [tuple(options[options.index(name) + 1] for name in ("--config", "--output"))]
        files += [(options[i + 1], options[i + 2]) for i, option in enumerate(options) if option == "--then"]
        names = [Path(output).stem for _, output in files]
        assert log.stem == names[0]
        launches.append(names)
        for name, (config, output) in zip(names, files, strict=True):
            assert RunConfig.load(config).label == name.partition(".")[0]
            for outcome in outcomes.get(name, []):
                if isinstance(outcome, BaseException):
                    raise outcome
                before = results.read_json(output)["rows"] if Path(output).exists() else []
                results.write_json(output, {"rows": [*before, outcome]})

    monkeypatch.setattr(compare.launcher, "launch", launch)
    monkeypatch.setattr(compare.launcher, "run_module", lambda *_, **__: None)
    files = [str(compare.launcher.ROOT / "ds_configs" / "cpu4" / f"{name}.json") for name in ("ring4", "tp2_pp2")]
    return compare.Comparison.make(files, {"sweep": (500,)}), outcomes, tmp_path / "logs"


def run_all(comparison, logs):
    return compare.run_all(comparison, logs, lambda: None, lambda text: None)


def test_a_failing_layout_takes_neither_the_others_results_with_it_nor_its_own(two_layouts):
    comparison, outcomes, logs = two_layouts
    outcomes["ring4"] = [row("ring4", 1.0, length=500), DsRingError("crashed")]
    outcomes["tp2_pp2"] = [row("tp2_pp2", 1.0)]
    found = run_all(comparison, logs)
    assert [(r["config_file"], r["length"]) for r in found.rows] == [("ring4.json", 500), ("tp2_pp2.json", 1000)]
    assert found.unfit == []
    assert found.failures == [{"layout": "ring4", "implementation": "ds_ring", "reason": "crashed"}]


def both_lengths(name):
    return [row(name, 1.0, length=500), row(name, 2.0)]


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


def timed(name, step_ms, *, size=1, length=1000, clock=1300.0):
    made = row(name, 4e6 / step_ms, length=length) | {"micro_batch": size, "sm_clock_mhz": clock}
    made |= {"step_samples_ms": f"{step_ms - 1:.2f} {step_ms + 1:.2f}", "step_spread": 0.0}
    made |= {"comm_exposed_ms": None, "comm_alone_ms": None}  # as where only speed is asked for
    return made | {"tps_per_gpu": made["tps"] / 4, "token_latency_us": 1e6 / made["tps"]}


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


@pytest.mark.parametrize("gpus", [0, 4])
def test_an_interruption_loses_no_row(two_layouts, gpus, monkeypatch):
    comparison, outcomes, logs = two_layouts
    monkeypatch.setattr(compare.launcher, "gpu_count", lambda: gpus)
    outcomes |= {"ring4": both_lengths("ring4"), "tp2_pp2": both_lengths("tp2_pp2")}
    assert len(run_all(comparison, logs).rows) == 4  # whose files are there at the next comparison
    outcomes["tp2_pp2"] = [row("tp2_pp2", 1.0, length=500), KeyboardInterrupt()]
    kept = []
    with pytest.raises(KeyboardInterrupt):
        compare.run_all(comparison, logs, lambda: None, lambda text: None, kept.append)
    assert [(r["config_file"], r["length"]) for r in kept[0].rows] == [
        ("ring4.json", 500), ("ring4.json", 1000), ("tp2_pp2.json", 500)
    ]  # fmt: skip
    assert kept[0].not_run == ["tp2_pp2"]


def test_an_interrupted_second_half_leaves_the_first_and_says_so(two_layouts):
    comparison, outcomes, logs = two_layouts
    outcomes |= {name: [timed(name, 100.0, length=500), timed(name, 200.0)] for name in ("ring4", "tp2_pp2")}
    outcomes |= {"tp2_pp2.back1": [timed("tp2_pp2", 102.0, length=500), KeyboardInterrupt()]}
    kept = []
    with pytest.raises(KeyboardInterrupt):
        compare.run_all(
            compare.Comparison(comparison.runs, there_and_back=True), logs, lambda: None, lambda text: None, kept.append
        )
    assert [r["step_ms"] for r in kept[0].rows] == [100.0, 200.0, 100.0, 200.0]
    assert kept[0].not_run == ["tp2_pp2 on the way back", "ring4 on the way back"]


@pytest.mark.parametrize("latency", [None, [500, 1000]], ids=["batch", "latency"])
def test_an_interruption_leaves_the_earlier_result_and_beside_it_what_there_is_and_is_not(
    two_layouts, latency, monkeypatch
):
    comparison, outcomes, logs = two_layouts
    monkeypatch.setattr(checkpoint, "ensure", lambda run, report: None)
    files = [str(compare.launcher.ROOT / "ds_configs" / "cpu4" / file.name) for file, _ in comparison.runs]
    output, kept = logs.with_name("found.json"), logs.with_name("found.partial.json")
    args = options.run_parser(None).parse_args(["--output", str(output), *([] if latency else ["--sweep", "500"])])
    vars(args).update(layouts=files, latency=latency, baseline=None, there_and_back=False)

    def left():
        return sorted(file.name for file in output.parent.glob("found.*") if file.is_file())

    outcomes |= {name: both_lengths(name) for name in ("single", "ring4", "tp2_pp2")}
    assert "not_run" not in work(args)
    complete, earlier = ["found.json", "found.md", "found.png"], output.read_text()
    assert left() == complete
    outcomes["ring4"] = [row("ring4", 1.0, length=500), KeyboardInterrupt()]
    if not latency:
        with pytest.raises(KeyboardInterrupt):  # before any layout is through
            work(args)
        assert results.read_json(kept, partial=True)["not_run"] == ["ring4", "tp2_pp2"]
    outcomes |= {"ring4": both_lengths("ring4"), "tp2_pp2": [KeyboardInterrupt()]}
    with pytest.raises(KeyboardInterrupt):
        work(args)
    assert left() == [*complete[:2], "found.partial.json", complete[2]]
    assert output.read_text() == earlier
    with pytest.raises(ConfigError, match=r"found\.partial\.json is a partial result"):
        results.read_json(kept)
    document = results.read_json(kept, partial=True)
    assert (document["not_run"], document["failed"]) == (["tp2_pp2"], [])
    assert {r["layout"] for r in document["rows"]} == ({"single", "ring4"} if latency else {"ring4"})
    outcomes["tp2_pp2"] = both_lengths("tp2_pp2")
    assert work(args)["status"] == "complete"
    assert left() == complete
    assert output.read_text() != earlier


def test_an_interruption_before_the_first_row_keeps_nothing(two_layouts):
    comparison, outcomes, logs = two_layouts
    outcomes["ring4"], kept = [KeyboardInterrupt()], []
    with pytest.raises(KeyboardInterrupt):
        compare.run_all(comparison, logs, lambda: None, lambda text: None, kept.append)
    assert kept == []


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


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConfigError("cannot be"), "cannot be"),
        (LaunchError("a long story", "RuntimeError: [/__w/pair.cc:537] closed [127.0.0.1]:1\x1b[0m"),
         "RuntimeError: [/__w/pair.cc:537] closed [127.0.0.1]:1\\x1b[0m"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (KeyError("rows"), "KeyError: 'rows'"),
    ],
    ids=["refused", "brackets", "full disk", "ours"],
)  # fmt: skip
def test_the_death_of_one_layout_costs_no_other_its_rows(two_layouts, error, reason):
    comparison, outcomes, logs = two_layouts
    outcomes |= {"ring4": [error], "tp2_pp2": both_lengths("tp2_pp2")}
    console = progress.PlainConsole(file=io.StringIO(), width=200)
    with progress.steps(console, comparison.steps) as (advance, say):
        found = compare.run_all(comparison, logs, advance, say)
    console.print(comparison_table.terminal_table(found.rows, found.all_failures))
    assert [(r["layout"], r["length"]) for r in found.rows] == [("tp2_pp2", 500), ("tp2_pp2", 1000)]
    assert rank_rows.ours(found.failures) == found.failures
    assert [what["reason"] for what in found.failures] == [reason]
    assert f"failed: {reason}" in console.file.getvalue()


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
