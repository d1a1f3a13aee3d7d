"""A comparison that is interrupted, or of which a layout dies: what there is by then is kept."""

import io

import pytest

from benchmarks.cli.compare import work
from benchmarks.layouts import checkpoint, compare, rank_rows
from benchmarks.reports import comparison_table
from ds_ring.cli import options
from ds_ring.errors import ConfigError, LaunchError
from ds_ring.utils import progress, results
from tests.helpers.comparison_rows import both_lengths, row, run_all, timed


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
    assert "not_run" not in results.read_json(output)


def test_an_interruption_before_the_first_row_keeps_nothing(two_layouts):
    comparison, outcomes, logs = two_layouts
    outcomes["ring4"], kept = [KeyboardInterrupt()], []
    with pytest.raises(KeyboardInterrupt):
        compare.run_all(comparison, logs, lambda: None, lambda text: None, kept.append)
    assert kept == []


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
