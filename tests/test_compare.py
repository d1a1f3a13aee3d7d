"""Planning a comparison, judging its rows, and writing them down."""

import json
from pathlib import Path

import pytest

from ds_ring import compare, plots, report, results, verdict
from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError, DsRingError, LaunchError, OutOfMemory, UnsupportedModelError


def row(layout, tps, *, length=1000, mode="full", error=1e-6, dtype="fp32", peak=1e12, **degrees):
    sizes = {"dp_size": 1, "pp_size": 1, "tp_size": 1, "ring_degree": 1, "ulysses_degree": 1} | degrees
    return {
        "layout": layout, "implementation": "ds_ring", "mode": mode, "gpus": 4, **sizes,
        "batch": 4, "micro_batch": 1, "length": length, "dtype": dtype,
        "device": "a device",
        "tps": tps, "tpot_ms": 4e3 / tps, "mfu": tps / peak, "peak_flops_per_gpu": peak, "step_ms": 4e6 / tps,
        "bytes_sent_per_rank": 2**20, "comm_exposed_ms": 1.5, "max_rel_error": error, "rel_error": error / 2,
    }  # fmt: skip


def test_modes_are_compared_among_themselves(rows):
    short = [
        row("tp4", 1000.0, mode="prefill_only", tp_size=4),
        row("ring4", 1250.0, mode="prefill_only", ring_degree=4),
    ]
    judged = verdict.judge(rows + short)
    assert judged[: len(rows)] == verdict.judge(rows)
    assert judged[-1]["vs_baseline"] == pytest.approx(1.25)
    assert judged[-1]["vs_dp"] is None
    assert "one full forward (prefill)" in report.caption(judged)
    assert "one prefill of what the next token needs" in report.caption(short)
    assert [report.name_of(r) for r in judged[-3:]] == ["ring4", "tp4 (prefill only)", "ring4 (prefill only)"]


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
    ring, short = (r for r in verdict.judge(rows) if r["layout"] == "ring4")
    assert ring["vs_baseline"] == pytest.approx(1.2)
    assert ring["vs_dp"] == pytest.approx(0.96)
    assert short["vs_baseline"] == pytest.approx(1.5)
    assert short["vs_dp"] is None


def test_a_baseline_can_be_named(rows):
    ring = next(r for r in verdict.judge(rows, baseline="tp4") if r["layout"] == "ring4")
    assert ring["vs_baseline"] == pytest.approx(960 / 700)


def test_mfu_of_all_rows_refers_to_one_peak():
    judged = verdict.judge([row("dp4", 1000.0, peak=1e6, dp_size=4), row("ring4", 1000.0, peak=2e6, ring_degree=4)])
    assert judged[0]["mfu"] == pytest.approx(judged[1]["mfu"])


@pytest.mark.parametrize(
    ("dtype", "error", "agrees"),
    [("fp32", 9e-6, True), ("fp32", 2e-5, False), ("fp16", 9e-3, True), ("fp16", 1.1e-2, False), ("fp32", None, False)],
)
def test_a_row_agrees_only_within_its_dtypes_tolerance(dtype, error, agrees):
    one = row("ring4", 1.0, dtype=dtype, error=error or 0.0, ring_degree=4)
    if error is None:
        one |= {"max_rel_error": None, "rel_error": None}
    assert verdict.judge([one])[0]["agrees"] is agrees


def test_document_separates_the_table_from_the_sweep(rows):
    plan = compare.Plan([("a.json", RunConfig.load({}, max_length=1000, sweep=(500,)))])
    document = verdict.document(plan, verdict.judge(rows))
    assert [r["layout"] for r in document["rows"]] == ["dp4", "tp2_pp2", "tp4", "ring4"]
    assert len(document["sweep"]) == len(rows)
    assert plan.lengths == [500, 1000]
    rows[-1]["max_rel_error"] = 1.0
    assert verdict.disagreeing(verdict.judge(rows)) == ["ring4 at L = 500"]


def test_every_set_of_layouts_in_the_repository_compares(monkeypatch):
    for gpus, folder in [(0, "cpu4"), (1, "gpu1"), (2, "gpu2"), (3, "gpu2"), (4, "gpu4"), (8, "gpu8"), (16, "gpu8")]:
        monkeypatch.setattr(compare.launcher, "gpu_count", lambda n=gpus: n)
        files = compare.default_layouts()
        assert files
        assert all(f"/{folder}/" in f for f in files)
        plan = compare.Plan.make(files, {})
        labels = [run.label for _, run in plan.runs]
        assert labels == [file.stem for file, _ in plan.runs]


def test_layouts_with_different_workloads_are_refused(tmp_path):
    files = []
    for name, batch in (("a", 4), ("b", 8)):
        files.append(str(tmp_path / f"{name}.json"))
        section = {"model": "checkpoints/small", "parallel": {"ring_degree": 2}, "workload": {"batch_size": batch}}
        (tmp_path / f"{name}.json").write_text(json.dumps({"dtype": "fp32", "ds_ring": section}))
    with pytest.raises(ConfigError, match=r"b\.json differs from .*a\.json in workload or dtype"):
        compare.Plan.make(files, {})
    assert len(compare.Plan.make(files, {"batch_size": 4}).runs) == 2


def test_the_report_shows_every_layout_and_the_command(rows):
    plan = compare.Plan([("a.json", RunConfig.load({}, max_length=1000, sweep=(500,)))])
    document = results.provenance() | verdict.document(plan, verdict.judge(rows))
    text = report.markdown(document)
    assert "| ring4 | 960 | 4.167 | +20.0 % | -4.0 % |" in text
    assert "| tp2_pp2 | 100 | 800 |" in text
    assert document["command"] in text
    assert report.terminal_table(document["rows"]).row_count == 4


def test_the_plot_is_a_picture(rows, tmp_path):
    plan = compare.Plan([("a.json", RunConfig.load({}, max_length=1000, sweep=(500,)))])
    plots.draw(verdict.document(plan, verdict.judge(rows)), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_write_leaves_the_previous_result(tmp_path, monkeypatch):
    file = tmp_path / "result.json"
    results.write_json(file, {"rows": [1]})

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results.os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        results.write_json(file, {"rows": [2]})
    assert results.read_json(file) == {"rows": [1]}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


@pytest.fixture
def two_layouts(tmp_path, monkeypatch):
    """A plan of ring4 and tp2_pp2 whose launcher does what ``outcomes`` says by layout, and its folder of logs.
    ``outcomes["launches"]`` lists what was launched together."""
    outcomes = {"launches": (launches := [])}

    def launch(script, ranks, options, *, log, report):
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
    return compare.Plan.make(files, {"sweep": (500,)}), outcomes, tmp_path / "logs"


def run_all(plan, logs):
    return compare.run_all(plan, logs, lambda: None, lambda text: None)


def test_a_failing_layout_takes_neither_the_others_results_with_it_nor_its_own(two_layouts):
    plan, outcomes, logs = two_layouts
    outcomes["ring4"] = [row("ring4", 1.0, length=500), DsRingError("crashed")]
    outcomes["tp2_pp2"] = [row("tp2_pp2", 1.0)]
    found = run_all(plan, logs)
    assert [(r["config_file"], r["length"]) for r in found.rows] == [("ring4.json", 500), ("tp2_pp2.json", 1000)]
    assert found.unfit == []
    assert found.failures == [{"layout": "ring4", "implementation": "ds_ring", "reason": "crashed"}]


def both_lengths(name):
    return [row(name, 1.0, length=500), row(name, 2.0)]


def test_on_gpus_layouts_share_a_launch(two_layouts, monkeypatch):
    plan, outcomes, logs = two_layouts
    outcomes |= {"ring4": both_lengths("ring4"), "tp2_pp2": both_lengths("tp2_pp2")}
    apart = run_all(plan, logs)
    assert outcomes["launches"] == [["ring4"], ["tp2_pp2"]]
    monkeypatch.setattr(compare.launcher, "gpu_count", lambda: 4)
    assert run_all(plan, logs).rows == apart.rows
    assert outcomes["launches"][2:] == [["ring4", "tp2_pp2"]]


def test_other_implementations_and_other_numbers_of_ranks_are_launched_apart(two_layouts, monkeypatch):
    plan, outcomes, logs = two_layouts
    monkeypatch.setattr(compare.launcher, "gpu_count", lambda: 4)
    file, run = plan.runs[0]
    one, tensor = RunConfig.load(run, ring_degree=1), RunConfig.load(run, ring_degree=1, tp_size=4)
    peer = RunConfig.load(run, implementation="deepspeed_ulysses", ring_degree=1, ulysses_degree=4)
    others = [(file.with_stem(name), job) for name, job in (("deepspeed_ulysses4", peer), ("tp4", tensor))]
    jobs = [(file.with_stem("single"), one), *plan.runs, *others]
    outcomes |= {name: both_lengths(name) for name in ("single", "ring4", "tp2_pp2", "deepspeed_ulysses4", "tp4")}
    advanced = []
    found = compare.run_all(compare.Plan.checked(jobs), logs, lambda: advanced.append(1), lambda text: None)
    assert outcomes["launches"] == [["single"], ["ring4", "tp2_pp2"], ["deepspeed_ulysses4"], ["tp4"]]
    assert len(advanced) == len(plan.lengths) + len(jobs)
    assert [r["layout"] for r in found.rows[::2]] == ["single", "ring4", "tp2_pp2", "deepspeed_ulysses4", "tp4"]


def test_who_fails_behind_others_is_tried_first_of_a_launch(two_layouts, monkeypatch):
    plan, outcomes, logs = two_layouts
    monkeypatch.setattr(compare.launcher, "gpu_count", lambda: 4)
    plan = compare.Plan.checked([*plan.runs, (Path("tp4.json"), RunConfig.load(plan.runs[1][1], tp_size=4, pp_size=1))])
    outcomes["ring4"] = both_lengths("ring4")
    outcomes["tp2_pp2"] = [row("tp2_pp2", 1.0, length=500), OutOfMemory("out of memory on rank 1")]
    outcomes["tp4"] = both_lengths("tp4")
    found = run_all(plan, logs)
    assert outcomes["launches"] == [["ring4", "tp2_pp2", "tp4"], ["tp2_pp2", "tp4"], ["tp4"]]
    assert [(r["layout"], r["length"]) for r in found.rows] == [
        ("ring4", 500), ("ring4", 1000), ("tp2_pp2", 500), ("tp4", 500), ("tp4", 1000)
    ]  # fmt: skip
    assert [(what["layout"], what["length"]) for what in found.unfit] == [("tp2_pp2", 1000)]
    assert found.failures == []


def test_a_launch_that_fails_at_its_end_is_a_failure_and_loses_no_row(two_layouts, monkeypatch):
    plan, outcomes, logs = two_layouts
    monkeypatch.setattr(compare.launcher, "gpu_count", lambda: 4)
    outcomes |= {"ring4": both_lengths("ring4"), "tp2_pp2": [*both_lengths("tp2_pp2"), DsRingError("hung up")]}
    found = run_all(plan, logs)
    assert len(found.rows) == 4
    assert [(failure["layout"], failure["reason"]) for failure in found.failures] == [("tp2_pp2", "hung up")]


def timed(name, step_ms, *, size=1, length=1000, clock=1300.0):
    made = row(name, 4e6 / step_ms, length=length) | {"micro_batch": size, "sm_clock_mhz": clock}
    made |= {"step_samples_ms": f"{step_ms - 1:.2f} {step_ms + 1:.2f}", "step_spread": 0.0}
    return made | {"tps_per_gpu": made["tps"] / 4, "token_latency_us": 1e6 / made["tps"]}


@pytest.mark.parametrize("gpus", [0, 4])
def test_the_way_back_runs_what_counts_last_to_first_and_the_means_stand(two_layouts, gpus, monkeypatch):
    plan, outcomes, logs = two_layouts
    monkeypatch.setattr(compare.launcher, "gpu_count", lambda: gpus)
    outcomes["ring4"] = [timed("ring4", 100.0, size=1), timed("ring4", 99.0, size=2)]
    outcomes["tp2_pp2"] = [timed("tp2_pp2", 120.0, size=1), timed("tp2_pp2", 130.0, size=2)]
    outcomes["ring4.back2"] = [timed("ring4", 109.0, size=2, clock=1200.0)]
    outcomes["tp2_pp2.back1"] = [timed("tp2_pp2", 122.0, size=1)]
    runs = [(file, RunConfig.load(run, micro_batch_sizes=(1, 2), sweep=())) for file, run in plan.runs]
    plan, advanced = compare.Plan(runs, there_and_back=True), []
    found = compare.run_all(plan, logs, lambda: advanced.append(1), lambda text: None)
    back = ["tp2_pp2.back1", "ring4.back2"]
    there = ["ring4", "tp2_pp2"]
    assert outcomes["launches"] == ([there, back] if gpus else [[name] for name in (*there, *back)])
    assert len(advanced) == plan.steps
    config = RunConfig.load(logs / "ring4.back2.config.json").workload
    assert (config.micro_batches, config.lengths, config.speed_only) == ([2], [1000], True)
    assert [(r["layout"], r["micro_batch"], round(r["step_ms"], 6)) for r in found.rows] == [
        ("ring4", 1, 100.0), ("ring4", 2, 104.0), ("tp2_pp2", 1, 121.0), ("tp2_pp2", 2, 130.0)
    ]  # fmt: skip
    ring = found.rows[1]
    assert (ring["ways_ms"], ring["step_samples_ms"]) == ("99.00 109.00", "98.00 100.00 108.00 110.00")
    assert ring["sm_clock_mhz"] == 1250.0
    assert ring["step_spread"] == pytest.approx(12 / 104)
    assert ring["tps"] == pytest.approx(4e6 / 104.0) == pytest.approx(4 * ring["tps_per_gpu"])
    assert ring["tpot_ms"] == pytest.approx(4e3 / ring["tps"])
    # Another size may look faster now that its own mean is not known.
    assert [r["micro_batch"] for r in verdict.document(plan, verdict.judge(found.rows))["rows"]] == [2, 1]


def test_what_fails_on_the_way_back_keeps_its_figure_and_is_a_failure(two_layouts):
    plan, outcomes, logs = two_layouts
    outcomes |= {name: [timed(name, 100.0, length=500), timed(name, 200.0)] for name in ("ring4", "tp2_pp2")}
    outcomes["ring4.back1"] = [timed("ring4", 102.0, length=500), DsRingError("hung up")]
    outcomes["tp2_pp2.back1"] = outcomes["tp2_pp2"]
    found = run_all(compare.Plan(plan.runs, there_and_back=True), logs)
    assert [(r["layout"], round(r["step_ms"], 6), "ways_ms" in r) for r in found.rows] == [
        ("ring4", 101.0, True), ("ring4", 200.0, False), ("tp2_pp2", 100.0, True), ("tp2_pp2", 200.0, True)
    ]  # fmt: skip
    assert [what["reason"] for what in found.failures] == ["on the way back: hung up"]


@pytest.mark.parametrize("gpus", [0, 4])
def test_an_interruption_loses_no_row(two_layouts, gpus, monkeypatch):
    plan, outcomes, logs = two_layouts
    monkeypatch.setattr(compare.launcher, "gpu_count", lambda: gpus)
    outcomes |= {"ring4": both_lengths("ring4"), "tp2_pp2": both_lengths("tp2_pp2")}
    assert len(run_all(plan, logs).rows) == 4  # whose files are there at the next comparison
    outcomes["tp2_pp2"] = [row("tp2_pp2", 1.0, length=500), KeyboardInterrupt()]
    kept = []
    with pytest.raises(KeyboardInterrupt):
        compare.run_all(plan, logs, lambda: None, lambda text: None, kept.append)
    assert [(r["config_file"], r["length"]) for r in kept[0].rows] == [
        ("ring4.json", 500), ("ring4.json", 1000), ("tp2_pp2.json", 500)
    ]  # fmt: skip


def test_an_interruption_before_the_first_row_keeps_nothing(two_layouts):
    plan, outcomes, logs = two_layouts
    outcomes["ring4"], kept = [KeyboardInterrupt()], []
    with pytest.raises(KeyboardInterrupt):
        compare.run_all(plan, logs, lambda: None, lambda text: None, kept.append)
    assert kept == []


def test_what_did_not_fit_is_what_has_no_row(two_layouts):
    plan, outcomes, logs = two_layouts
    outcomes["ring4"] = [row("ring4", 1.0, length=500), OutOfMemory("out of memory on rank 1")]
    outcomes["tp2_pp2"] = [OutOfMemory("out of memory on rank 0")]
    found = run_all(plan, logs)
    assert [r["length"] for r in found.rows] == [500]
    assert [(what["layout"], what["length"]) for what in found.unfit] == [
        ("ring4", 1000), ("tp2_pp2", 500), ("tp2_pp2", 1000)
    ]  # fmt: skip
    assert found.failures == []


def test_a_sweep_over_micro_batches_goes_on_behind_what_does_not_fit(two_layouts):
    plan, outcomes, logs = two_layouts
    plan = compare.Plan.make([str(file) for file, _ in plan.runs], {"sweep": (500,), "micro_batch_sizes": (4, 1, 2)})
    lack = OutOfMemory("out of memory on rank 1")

    def timed(size, length, tps):
        return row("ring4", tps, length=length, ring_degree=4) | {"micro_batch": size}

    outcomes["ring4"] = [timed(1, 500, 3.0), timed(1, 1000, 4.0), timed(2, 500, 5.0), lack]
    outcomes["ring4.2"] = [timed(4, 500, 2.0)]
    outcomes["tp2_pp2"] = [row("tp2_pp2", 2.0, length=500, tp_size=2, pp_size=2), lack]
    outcomes["tp2_pp2.2"] = [lack]
    found = run_all(plan, logs)
    assert RunConfig.load(logs / "ring4.2.config.json").workload.micro_batches == [4]
    assert RunConfig.load(logs / "ring4.2.config.json").workload.lengths == [500]
    assert [(u["layout"], u["micro_batch"], u["length"]) for u in found.unfit] == [
        ("ring4", 2, 1000), ("ring4", 4, 1000), ("tp2_pp2", 1, 1000), ("tp2_pp2", 2, 1000), ("tp2_pp2", 4, 1000),
        ("tp2_pp2", 2, 500), ("tp2_pp2", 4, 500),
    ]  # fmt: skip
    failed = found.without_row
    assert failed == [{"layout": "tp2_pp2", "implementation": "ds_ring", "reason": "out of memory at L = 1000"}]
    document = verdict.document(plan, verdict.judge(found.rows), failed)
    assert [(r["layout"], r["length"], r["micro_batch"], r["micro_batches"]) for r in document["sweep"]] == [
        ("ring4", 500, 2, [1, 2, 4]), ("ring4", 1000, 1, [1]), ("tp2_pp2", 500, 1, [1])
    ]  # fmt: skip
    assert [r["vs_baseline"] for r in document["sweep"]] == [2.5, None, 1.0]
    assert len(document["micro_batches"]) == 5
    text = report.markdown(results.provenance() | document)
    assert "| ring4 | 1 of 1 | 4 |" in text
    assert "| tp2_pp2 | failed: out of memory at L = 1000 |  |" in text
    assert report.terminal_table(document["rows"], failed).row_count == 2


def test_a_peer_that_fails_is_a_line_of_the_table_and_no_failure_of_ours(two_layouts):
    plan, outcomes, logs = two_layouts
    ring, run = plan.runs[0]
    peer = RunConfig.load(run, implementation="deepspeed_ulysses", ring_degree=1, ulysses_degree=4)
    plan = compare.Plan.checked([(ring, run), (ring.with_stem("deepspeed_ulysses4"), peer)])
    outcomes["ring4"] = [row("ring4", 1.0)]
    for error, reason in (
        (LaunchError("a long story\nof many lines", "RuntimeError: no kernel"), "RuntimeError: no kernel"),
        (UnsupportedModelError("Model asks for s_aux"), "Model asks for s_aux"),
        (ConfigError("it is not installed; pip install it"), "it is not installed; pip install it"),
    ):
        outcomes["deepspeed_ulysses4"] = [error]
        found = run_all(plan, logs)
        assert [r["layout"] for r in found.rows] == ["ring4"]
        assert verdict.ours(found.without_row) == []
        (line,) = found.without_row
        assert (line["layout"], line["reason"]) == ("deepspeed_ulysses4", reason)
        assert report.table(found.rows, [line])[1][1][:2] == ["deepspeed_ulysses4", f"failed: {reason}"]
    outcomes["ring4"] = [ConfigError("cannot be")]
    with pytest.raises(ConfigError, match="cannot be"):
        run_all(plan, logs)


def test_a_peer_that_is_wrong_is_shown_and_no_failure_of_ours():
    wrong = row("deepspeed_ulysses4", 1.0, error=1.0, ulysses_degree=4) | {"implementation": "deepspeed_ulysses"}
    judged = verdict.judge([wrong])
    assert judged[0]["agrees"] is False
    assert verdict.disagreeing(judged) == []
    assert plots.kind(wrong) == "peer"


def test_context_parallel_is_refused_where_there_are_no_gpus(monkeypatch):
    folder = compare.launcher.ROOT / "ds_configs"
    files = [str(folder / "gpu2" / "ring2.json"), *sorted(map(str, (folder / "peers2").glob("*.json")))]
    monkeypatch.setattr(compare.launcher, "gpu_count", lambda: 0)
    with pytest.raises(ConfigError, match="implementation=context_parallel: PyTorch has it for GPUs alone"):
        compare.Plan.make(files, {})
    monkeypatch.setattr(compare.launcher, "gpu_count", lambda: 2)
    plan = compare.Plan.make(files, {})
    assert [run.label for _, run in plan.runs] == [
        "ring2", "context_parallel2", "deepspeed_ulysses2", "yunchang_ring2", "yunchang_ulysses2",
    ]  # fmt: skip


def test_lengths_at_which_the_reference_does_not_fit_are_unchecked(two_layouts, monkeypatch):
    plan, outcomes, logs = two_layouts

    def run_module(module, options, *, log, report):
        lengths = options[options.index("--length") + 1 : options.index("--output")]
        outputs = options[options.index("--output") + 1 :][: len(lengths)]
        assert lengths == ["500", "1000"]
        Path(outputs[0]).touch()
        raise OutOfMemory("out of memory on rank 0")

    monkeypatch.setattr(compare.launcher, "run_module", run_module)
    outcomes |= {"ring4": [row("ring4", 1.0, length=500), row("ring4", 1.0) | {"max_rel_error": None}]}
    found = run_all(plan, logs)
    assert found.unchecked == [1000]
    judged = verdict.judge(found.rows, unchecked=found.unchecked)
    assert [r["agrees"] for r in judged] == [True, None]
    assert verdict.disagreeing(judged) == []


def test_an_earlier_result_does_not_pass_for_a_run_that_wrote_none(two_layouts):
    plan, outcomes, logs = two_layouts
    outcomes |= {"ring4": [row("ring4", 1.0)], "tp2_pp2": [row("tp2_pp2", 1.0)]}
    assert len(run_all(plan, logs).rows) == 2
    outcomes["ring4"] = []
    found = run_all(plan, logs)
    assert [r["layout"] for r in found.rows] == ["tp2_pp2"]
    assert [failure["layout"] for failure in found.failures] == ["ring4"]


def test_an_interrupted_checkpoint_is_not_left_half_made(tmp_path, monkeypatch):
    run = RunConfig.load({}, model=str(tmp_path / "checkpoints" / "small"))

    def interrupted(source, directory, **_):
        directory.mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compare, "make_checkpoint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare.ensure_checkpoint(run, lambda text: None)
    assert list((tmp_path / "checkpoints").iterdir()) == []
    compare.ensure_checkpoint(run, lambda text: None)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["small"]
    assert (tmp_path / "checkpoints" / "small" / "config.json").is_file()
