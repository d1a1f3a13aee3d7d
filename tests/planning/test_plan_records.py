"""The planner held against what GPUs recorded: its constants, its steps, the order of layouts, its first choice."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import fields, replace
from statistics import median

import pytest

from benchmarks.planner import validation
from benchmarks.planner.cases import LEFT_OUT, RESULTS, Case, cases
from benchmarks.planner.fit import OF_ALL, OF_CARDS, fitted
from benchmarks.planner.measured import LINK_BYTES, attention, attention_in_steps, measured
from ds_ring.planning.cards import CARDS
from ds_ring.planning.rates import ATTENTION, SOURCES, Rates
from ds_ring.utils.results import read_json

HELD_OUT = [case for case in cases() if not case.is_fitted_on]
FITTED_ON = [case for case in cases() if case.is_fitted_on]


def test_every_record_of_steps_is_used_or_left_out_with_a_reason():
    with_steps = {
        file.name for file in RESULTS.glob("*.json")
        if any("step_ms" in row for row in read_json(file).get("rows", []) if isinstance(row, dict))
    }  # fmt: skip
    assert with_steps <= {case.record for case in cases()} | set(LEFT_OUT)
    assert all((RESULTS / name).is_file() for name in LEFT_OUT)


def test_what_is_held_out_has_other_lengths_counts_layouts_batches_and_models():
    def of(chosen: list[Case], figure: str) -> set[object]:
        return {
            "length": {case.config.workload.max_length for case in chosen}, "gpus": {case.gpus for case in chosen},
            "layout": {case.layout for case in chosen}, "model": {case.model for case in chosen},
            "batch": {case.config.workload.batch_size for case in chosen},
        }[figure]  # fmt: skip

    assert of(FITTED_ON, "length") == {10_000}
    assert of(FITTED_ON, "gpus") == {2}
    assert of(FITTED_ON, "model") == {"paper"}
    assert of(HELD_OUT, "length") >= {2048, 8192, 32_768, 131_072, 1_048_576}
    assert of(HELD_OUT, "gpus") == {1, 2, 4}
    assert of(HELD_OUT, "model") == {"paper", "llama_wide"}
    assert of(HELD_OUT, "layout") - of(FITTED_ON, "layout") >= {"tp2_pp2", "ulysses2_ring2", "tp4", "ring4", "pp4"}
    assert of(HELD_OUT, "batch") - of(FITTED_ON, "batch") == {2, 4, 8, 64}


class TestBars:
    def test_held_out_steps(self):
        errors = [abs(validation.error(case)) for case in HELD_OUT]
        assert len(errors) > 100
        assert median(errors) <= 0.04
        assert max(errors) <= 0.10

    def test_order_of_layouts(self):
        pairs = list(validation.comparable(HELD_OUT))
        assert len(pairs) > 250
        wrong = [(a, b) for a, b in pairs if validation.predicted_s(a) >= validation.predicted_s(b)]
        assert wrong == []

    def test_the_first_choice_is_the_fastest_or_hardly_slower(self):
        groups = defaultdict(list)
        for case in cases():
            groups[case.together, case.config.workload.micro_batch_size].append(case)
        for together, group in groups.items():
            first = min(group, key=validation.predicted_s)
            assert first.step_s <= 1.015 * min(case.step_s for case in group), together


def test_a_wrong_constant_shows():
    """The bars are no matter of course: attention at half its rate breaks them."""
    slow = replace(CARDS["H200"], rates=replace(CARDS["H200"].rates, attention_in_steps=0.45))
    case = next(case for case in HELD_OUT if case.config.workload.max_length == 131_072 and case.gpus == 4)
    assert validation.step_time(case.config, case.dims(), case.parameters(), slow).total > 1.2 * case.step_s


class TestConstants:
    def test_measured_ones_are_what_records_give(self):
        found = measured()
        link = found.pop(LINK_BYTES)
        assert [CARDS[name].link_bytes for name in OF_CARDS] == pytest.approx([link, link], rel=5e-3)
        for name, value in found.items():
            assert getattr(Rates(), name) == pytest.approx(value, rel=5e-3), name
            assert SOURCES[name].startswith("measured: ")
        for head_dim, (share, edge) in attention().items():
            assert (ATTENTION[head_dim].share, ATTENTION[head_dim].edge) == pytest.approx((share, edge), rel=5e-3)
        assert Rates().attention_in_steps == pytest.approx(attention_in_steps(attention()[512]), rel=5e-3)

    def test_fitted_ones_are_what_the_fit_gives(self):
        found = fitted()
        for name in OF_CARDS:
            assert CARDS[name].product_flops == pytest.approx(found[name], rel=5e-3)
        for name in OF_ALL:
            assert getattr(Rates(), name) == pytest.approx(found[name], rel=1e-2), name
            assert SOURCES[name].startswith("fitted")

    def test_every_one_has_a_record_that_exists_or_is_assumed(self):
        assert set(SOURCES) == {field.name for field in fields(Rates)}
        kinds = {name: source.split(":")[0].split(";")[0] for name, source in SOURCES.items()}
        assert set(kinds.values()) == {"measured", "fitted", "assumed"}
        assert {name for name, kind in kinds.items() if kind == "fitted"} == set(OF_ALL)
        for source in SOURCES.values():
            named = [word.strip(",;:") for word in source.split() if word.strip(",;:").endswith(".json")]
            assert all((RESULTS / name).is_file() for name in named)
            assert bool(named) == source.startswith("measured")


def test_the_record_is_what_the_command_writes():
    recorded, made = read_json(RESULTS / "planner.json"), validation.document()
    assert recorded["constants"] == made["constants"], "run launch/validate_planner.py"
    assert len(recorded["rows"]) == len(made["rows"])
    for was, row in zip(recorded["rows"][2:], made["rows"][2:], strict=True):
        assert was["predicted_ms"] == pytest.approx(row["predicted_ms"], rel=1e-6), row
    assert recorded["paper"] == made["paper"]
