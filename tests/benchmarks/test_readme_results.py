"""README.md shows what the records say: each of its figures is computed from the record that its line names."""

from __future__ import annotations

import re

import pytest

from benchmarks.reports.page import RESULTS
from ds_ring.process.launcher import ROOT
from ds_ring.utils.results import read_json

LINES = (ROOT / "README.md").read_text().splitlines()


def row(record, layout, length):
    rows = read_json(ROOT / RESULTS / record)["rows"]
    return next(row for row in rows if (row["layout"], row["length"]) == (layout, length))


def per_gpu(record, *layouts):
    return [f"{row(record, layout, 10000)['tps_per_gpu']:,.0f}" for layout in layouts]


def seconds(style, *layouts):
    return [f"{row('latency_gpu4.json', layout, 131072)['step_ms'] / 1e3:{style}} s" for layout in layouts]


def generation(record):
    found = read_json(ROOT / RESULTS / record)
    return [f"{found['ttft_ms']:,.0f} ms", f"{found['decode_tpot_ms']:.2f} ms"]


@pytest.mark.parametrize(
    ("beginning", "figures"),
    [
        ("One sequence of 131,072 tokens takes", lambda: seconds(".2f", "ring4", "single")),
        ("| 32 sequences", lambda: per_gpu("gpu2.json", "ring2", "dp2", "pp2", "tp2")),
        ("| 64 sequences", lambda: per_gpu("gpu4.json", "ring4", "dp4", "pp4", "tp4")),
        ("| One sequence", lambda: seconds(".3f", "ring4", "single", "tp4", "pp4")),
        (
            "| Other implementations",
            lambda: per_gpu("peers_gpu2.json", "ring2", "deepspeed_ulysses2", "yunchang_ring2", "context_parallel2"),
        ),
        (
            "| Generation after 131,072",
            lambda: generation("generate_128k_gpu2.json") + generation("generate_128k_gpu1.json"),
        ),
        (
            "1,048,576 tokens take",
            lambda: [f"{read_json(ROOT / RESULTS / 'longest_ring2.json')['longest']['seconds']:.0f} s"],
        ),
    ],
)
def test_results_are_those_of_the_records(beginning, figures):
    (line,) = (line.replace("*", "") for line in LINES if line.startswith(beginning))
    shown = [at for figure in figures() for at in [line.find(figure)]]
    assert -1 not in shown, f"{figures()} are recorded"
    assert shown == sorted(shown)
    for record in re.findall(r"`(\w+\.json)`", line):
        assert (ROOT / RESULTS / record).is_file()


def test_the_ratio_to_other_implementations_is_that_of_the_record():
    rows = read_json(ROOT / RESULTS / "peers_llama_wide_gpu2.json")["rows"]
    ring = next(row["tps"] for row in rows if row["layout"] == "ring2")
    best = max(row["tps"] for row in rows if row["implementation"] != "ds_ring")
    assert f"the ring does {ring / best:.2f} times the best of them" in " ".join(LINES)


def test_the_readme_is_short_and_begins_with_a_command():
    assert len(LINES) <= 130
    assert any(line.startswith("    ds-ring generate") for line in LINES[:30])
