"""The command that plans: what its options mean, what it refuses, and what it says of each layout."""

import re
import time

import pytest

from ds_ring.cli import plan
from ds_ring.errors import ConfigError

PAPER = ["--model", "ds_configs/models/paper.json", "--batch-size", "1024", "--max-length", "10000"]
PAPER += ["--micro-batch-size", "4"]


def document(*options: str) -> dict:
    return plan.work(plan.make_parser().parse_args([*PAPER, "--ranks", "16", *options]))


def test_the_machine_is_as_the_options_say():
    hosts, domain = document(), document("--gpus-per-host", "16")
    steps = [{row["layout"]: row for row in one["rows"]} for one in (hosts, domain)]
    assert "ulysses16" not in steps[0]
    assert steps[1]["ulysses16"]["tps"] > 1.3e6
    assert steps[0]["ring16"]["leaves_gb"] > 500
    assert steps[1]["ring16"]["leaves_gb"] == 0
    assert any("400 Gbit/s a GPU between hosts" in text for text in hosts["assumed"])
    assert not any("Gbit/s" in text for text in domain["assumed"])


def test_the_network_is_as_the_options_say(capsys):
    slow = document("--network-gbps", "100")
    assert any("100 Gbit/s a GPU between hosts" in text for text in slow["assumed"])
    shared = document("--network-gbps", "400", "--adapters-per-host", "2")
    assert [row["step_ms"] for row in slow["rows"]] == [row["step_ms"] for row in shared["rows"]]
    shown = capsys.readouterr().err
    assert re.search(
        r"^ulysses8_ring2 \(ulysses 8 in a host, ring 2 over 2 hosts\): \d+\.\d+ s = products ", shown, re.MULTILINE
    )
    assert "every rank receives 0.70 of all keys and values" in shown


HELP = "; --help lists the options"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--ranks", "0"], f"argument --ranks: 0 must be a whole number from 1 to 4096{HELP}"),
        (["--ranks", "-8"], f"argument --ranks: -8 must be a whole number from 1 to 4096{HELP}"),
        (["--ranks", "1000000000000"], f"argument --ranks: 1000000000000 must be a whole number from 1 to 4096{HELP}"),
        (["--batch-size", "1000000000000"], "batch_size=1000000000000 cannot be planned; take 1 to 1000000000"),
        (["--max-length", "1000000000000"], "max_length=1000000000000 cannot be planned; take 1 to 1000000000"),
        (["--gpus-per-host", "0"], f"argument --gpus-per-host: 0 must be a whole number of at least 1{HELP}"),
        (["--adapters-per-host", "0"], f"argument --adapters-per-host: 0 must be a whole number of at least 1{HELP}"),
        (["--network-gbps", "0"], f"argument --network-gbps: 0 must be a number above 0{HELP}"),
        (["--network-gbps", "nan"], f"argument --network-gbps: nan must be a number above 0{HELP}"),
        (["--network-gbps", "inf"], f"argument --network-gbps: inf must be a number above 0{HELP}"),
    ],
)  # fmt: skip
def test_what_no_machine_is_for_is_refused_at_once(options, text):
    began = time.perf_counter()
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        document(*options)
    assert time.perf_counter() - began < 3


def test_many_ranks_are_planned_in_seconds():
    began = time.perf_counter()
    assert document("--ranks", "3000", "--batch-size", "3000")["rows"]
    assert time.perf_counter() - began < 20


def test_a_small_model_s_figures_have_units_that_show_them(capsys):
    small = ["--model", "ds_configs/models/small.json", "--ranks", "2", "--max-length", "256"]
    found = plan.work(plan.make_parser().parse_args(small))
    shown = capsys.readouterr().err
    first, second = found["rows"][:2]
    for row in (first, second):
        cells = next(line for line in shown.splitlines() if line.startswith(f"│ {row['layout']} ")).split("│")
        step, sent, between, memory = (cells[at].strip() for at in (4, 6, 7, 8))
        assert (step, between) == (f"{row['step_ms']:.3g} ms", "0 B")
        assert sent == f"{1e6 * row['stays_gb']:.0f} kB"
        assert memory == f"{2**10 * row['memory_gib']:.1f} MiB"
        assert row["sum"].startswith(f"{1e3 * row['step_ms']:.2f} us = products ")
    assert "a rank sends" in second["why_slower"]
    assert "0 GB" not in second["why_slower"]
    assert found["reason"] == (
        f"{first['layout']}: layers are shared, which is faster here; {first['tps']:,.0f} tok/s are predicted, and "
        f"{second['tps']:,.0f} tok/s for {second['layout']}, the next best layout"
    )
