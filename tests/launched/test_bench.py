"""``bench.py`` in four real processes over gloo: what it measures, and that the model it measures is right."""

import json
import sys

import pytest

from tests.helpers.launching import in_one_start, last_line, run

pytestmark = pytest.mark.launch

LAYOUTS = {
    "tp2_pp2": ["--tp-size", 2, "--pp-size", 2],
    "ulysses2_ring2_pass_kv": ["--ulysses-degree", 2, "--ring-degree", 2, "--ring-variant", "pass_kv"],
    "dp2_tp2": ["--dp-size", 2, "--tp-size", 2, "--interleave", "on"],
}
WARMUP = {"dp2_tp2": 4}
"""Rows of the untimed passes: two micro-batches a replica, or there would be none to be in flight with."""


@pytest.fixture(scope="module")
def measured(neox, tmp_path_factory):
    """A folder for each layout, and its run. After the first comes what ``--then`` names."""
    reference = tmp_path_factory.mktemp("reference") / "reference.safetensors"
    sizes = ["--dtype", "fp32", "--rows", 2, "--length", 201]
    run([sys.executable, "-m", "benchmarks.layouts.parity", "--model", neox, *sizes, "--output", reference])
    folder = tmp_path_factory.mktemp("bench")
    ring4 = folder / "ring4.json"
    section = {"model": str(neox), "parallel": {"ring_degree": 4}, "workload": {"batch_size": 4, "max_length": 201}}
    ring4.write_text(json.dumps({"dtype": "fp32", "ds_ring": section}))
    workload = ["--model", neox, "--dtype", "fp32", "--batch-size", 4, "--max-length", 201, "--repeats", 2]
    workload += ["--mode", "both", "--references", reference]
    scripts = []
    for label, layout in LAYOUTS.items():
        files = ["--trace", folder / label / "trace.json", "--output", folder / label / "bench.json"]
        then = ["--then", ring4, folder / label / "after.json"] if not scripts else []
        scripts.append(
            ["launch/bench.py", *layout, *workload, "--warmup-batch-size", WARMUP.get(label, 2), *files, *then]
        )
    return folder, dict(zip(LAYOUTS, in_one_start(4, scripts, folder / "said"), strict=True))


@pytest.mark.parametrize("label", LAYOUTS)
def test_bench_measures_and_agrees_with_the_unsharded_model(label, measured):
    folder, done = measured[0] / label, measured[1][label]
    assert done.codes == [0] * 4, done.stderr
    document = last_line(done)
    assert document == json.loads((folder / "bench.json").read_text())
    row, short = document["rows"]
    assert [row["mode"], short["mode"]] == ["full", "prefill_only"]
    assert short["max_rel_error"] < 1e-5
    assert short["flops_per_token"] < row["flops_per_token"]
    assert short["bytes_sent_per_rank"] < row["bytes_sent_per_rank"]
    assert short["bytes_formula"] is None
    assert row["layout"] == label
    assert (row["gpus"], row["batch"], row["length"], row["dtype"]) == (4, 4, 201, "fp32")
    assert row["max_rel_error"] < 1e-5
    assert (row["in_flight"] > 1) == ("on" in LAYOUTS[label])
    assert row["warmup_batch"] == WARMUP.get(label, 2)  # whose bytes are scaled to the four rows
    assert row["bytes_sent_per_rank"] == row["bytes_formula"] > 0
    assert row["tpot_ms"] == pytest.approx(1e3 * row["batch"] / row["tps"])
    assert row["tps"] == pytest.approx(4 * 201 / (row["step_ms"] / 1e3))
    assert 0 < row["mfu"] < 1
    assert row["trace"] == str(folder / "trace.json")
    assert [len(list(folder.glob(f"trace{rank}.json"))) for rank in ("", ".rank1", ".rank2", ".rank3")] == [1] * 4
    by_rank = [float(ms) for ms in row["trace_gemm_ms_by_rank"].split()]
    assert len(by_rank) == 4
    assert row["trace_gemm_ms"] == pytest.approx(sum(by_rank) / 4, abs=0.01)
    assert min(by_rank) > 0
    layers = 4 // (2 if label == "tp2_pp2" else 1)
    assert 0 < row["trace_transfer_exposed_ms_per_layer"] * layers < row["trace_window_ms"]
    assert "fused (plain PyTorch on cpu)" in done.stderr


def test_another_layout_is_measured_after_it_in_the_same_processes(measured):
    (after,) = json.loads((measured[0] / "tp2_pp2" / "after.json").read_text())["rows"]
    assert (after["layout"], after["length"]) == ("ring4", 201)
    assert after["max_rel_error"] < 1e-5
