"""What the performance page opens with: records alone, in few lines, and what is missing is named."""

import json

import pytest

from benchmarks.reports import page, summary
from benchmarks.reports.manifest import Summary
from ds_ring.process.launcher import ROOT
from tests.helpers.comparison_rows import row
from tests.helpers.pages import make_page, section, tables
from tests.helpers.recorded_rows import forward_row


def compared(layout, tps, vs_dp=None, **more):
    ranks = {"gpus": 2, "device": "NVIDIA H100 80GB HBM3", "tps_per_gpu": tps / 2}
    return row(layout, tps, **more) | ranks | {"vs_dp": vs_dp, "vs_baseline": 1.05, "vs_one_rank": 0.5}


DP2, RING2 = compared("dp2", 182000.0, 1.0, dp_size=2), compared("ring2", 180000.0, 0.989, ring_degree=2)


@pytest.fixture
def shown(tmp_path):
    def show(kind, length=None, name="", **records):
        for file, rows in records.items():
            (tmp_path / f"{file}.json").write_text(json.dumps({"rows": rows}))
        files = [{"file": f"{file}.json", "name": name} for file in [*records, "nobody"]]
        table = {"title": "Rates:", "caption": "of all.", "kind": kind, "length": length, "records": files}
        made = Summary.model_validate({"tables": [table], "note": "Multicast was off."})
        text = "\n".join(summary.lines(made, tmp_path))
        return text, tables(text)[0]

    return show


def test_the_summary_of_the_page_fits_a_screen_and_says_what_favours_whom():
    opening = (ROOT / page.PAGE).read_text().split("\n## ")[0]
    assert len(opening.splitlines()) <= 40
    assert "NVLink multicast was off" in opening
    assert "favours ring and Ulysses over TP" in opening
    manifest, _ = page.read(ROOT)
    for record in (record.file for table in manifest.summary.tables for record in table.records):
        assert f"`{record}`" in opening


def test_throughput_has_a_row_of_each_family_at_the_length_and_names_the_record(shown):
    other_length = RING2 | {"length": 500, "tps_per_gpu": 1.0}
    mixed = compared("tp2_pp2", 5.0, tp_size=2, pp_size=2)
    short_mode = RING2 | {"mode": "prefill_only", "tps_per_gpu": 2.0}
    text, rows = shown("throughput", length=1000, two=[RING2, other_length, mixed, short_mode, DP2])
    assert [r["layout"] for r in rows] == ["DP", "ring"]
    ring = {"layout": "ring", "GPUs": "2 x H100", "tok/s a GPU": "90,000", "÷ DP": "0.989", "÷ best of TP, PP": "1.050"}
    assert rows[1] == ring | {"record": "`two.json`"}
    assert "Not recorded yet: `nobody.json`." in text
    assert text.rstrip().endswith("Multicast was off.")


def test_one_sequence_has_a_row_of_each_record_and_its_ratio_to_one_gpu(shown):
    alone = compared("single", 500.0) | {"gpus": 1, "step_ms": 3139.0}
    _, rows = shown("one_sequence", length=1000, two=[alone, RING2 | {"step_ms": 1588.0}], none=[alone])
    assert [(r["GPUs"], r["one GPU (s)"], r["ring (s)"], r["TP (s)"]) for r in rows] == [
        ("2 x H100", "3.139", "1.588 (0.500)", "-")
    ]


def test_other_implementations_are_compared_with_our_ring(shown):
    ulysses = compared("deepspeed_ulysses2", 120000.0, ulysses_degree=2) | {"implementation": "deepspeed_ulysses"}
    yunchang = compared("yunchang_ring2", 100000.0, ring_degree=2) | {"implementation": "yunchang"}
    (only,) = shown("implementations", name="small", two=[DP2, RING2, ulysses, yunchang])[1]
    assert [only["model"], only["our ring"], only["DeepSpeed's Ulysses"]] == ["small", "90,000", "60,000"]
    assert [only["yunchang's ring"], only["yunchang's Ulysses"], only["ring ÷ best other"]] == ["50,000", "-", "1.50"]


def test_sections_of_a_topic_are_under_its_heading(tmp_path):
    sections = [section("forward", "one", topic="Time & place"), section("longest", "far", topic="Far")]
    text, _ = make_page(tmp_path, sections, one={"rows": [forward_row()]})
    assert "\n## Time & place\n\n### About forward\n" in text
    assert "Details: [Time & place](#time--place)." in text
    assert "## Far" not in text
