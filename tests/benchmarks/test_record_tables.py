"""Tables of the performance page: their figures, what is missing, and what is compared with what."""

from functools import partial

import pytest

from benchmarks.layouts import latency
from tests.helpers.comparison_rows import row as compared
from tests.helpers.comparison_rows import timed_row as timed
from tests.helpers.pages import make_page, section, tables
from tests.helpers.recorded_rows import forward_row


@pytest.fixture
def made(tmp_path):
    return partial(make_page, tmp_path)


def test_a_forward_and_where_it_goes(made):
    traced = {"trace_window_ms": 100.0, "trace_gemm_ms": 75.0, "trace_attention_ms": 20.0, "trace_idle_ms": 0.0}
    rows = [forward_row(sm_clock_mhz=1300, power_w=700.4, **traced), forward_row(mode="prefill_only", tps=1250.0)]
    text, _ = made([section("forward", "one")], one={"rows": rows})
    (full, prefill_only), (passes,) = tables(text)
    assert [full["TPS (tok/s)"], full["MFU"], full["step (ms)"], full["spread"]] == ["1,000", "50.0 %", "80.0", "1.0 %"]
    assert [full["MHz"], full["W"]] == ["1300", "700"]
    assert [prefill_only["TPS (tok/s)"], prefill_only["MHz"], prefill_only["W"]] == ["1,250", "-", "-"]
    assert [passes["pass (ms)"], passes["matrix products"], passes["attention"]] == [
        "100.0", "75.0 ms (75.0 %)", "20.0 ms (20.0 %)"
    ]  # fmt: skip
    assert "idle" not in passes
    assert "performance/one.png" in text


def test_transfers_are_means_of_both_orders_without_the_warming(made):
    def row(phase, traffic, nbytes, ms, **more):
        return {
            "phase": phase, "traffic": traffic, "nbytes": nbytes, "layer_ms": ms, "transfer_ms": nbytes / 2**21,
            "sm_clock_mhz": 1300, "power_w": 700, "link_awake": 0.0,
        } | more  # fmt: skip

    rows = [
        row("warming", "nothing", 0, 99.0, second=1), row("there", "nothing", 0, 19.0),
        row("there", "a lot", 2**21, 20.0), row("back", "a lot", 2**21, 22.0, link_awake=1.0),
        row("back", "nothing", 0, 21.0),
    ]  # fmt: skip
    text, _ = made([section("transfers", "one")], one={"rows": rows, "link_sleeps_after_ms": 0.5})
    ((nothing, lot),) = tables(text)
    assert [nothing["layer (ms)"], nothing[""], nothing["link awake"]] == ["20.00", "+0.0 %", "0%"]
    assert [lot["transfer (ms)"], lot["layer (ms)"], lot[""], lot["link awake"]] == ["1.00", "21.00", "+5.0 %", "50%"]
    assert "0.5 ms" in text


def attention_row(impl, share, **more):
    return {
        "case": "a case", "impl": impl, "ms": 1.0 / share, "tflops": 600 * share, "share": share, "rel_error": 3e-4,
        "lse_error": None, "sm_clock_mhz": 1400.0, "power_w": 700.0, "detail": "",
    } | more  # fmt: skip


def test_attention_with_its_targets(made):
    targets = [
        {"what": "ours", "figure": "share", "of": {"case": "a case", "impl": "ds_ring"}, "at_least": 0.9},
        {"what": "error", "figure": "rel_error", "of": {"case": "a case"}, "at_most": 4e-4},
        {"what": "elsewhere", "figure": "share", "of": {"case": "another"}, "at_least": 0.5},
    ]
    rows = [
        attention_row("ds_ring", 0.72),
        attention_row("sdpa", 0.2),
        {"case": "a case", "impl": "flex", "error": "no"},
    ]
    text, summary = made([section("attention", "kernel", targets=targets)], kernel={"device": "a GPU", "rows": rows})
    (ours, sdpa, flex), results = tables(text)
    assert [ours["ms"], ours["TFLOP/s"], ours["share"], ours["error"]] == ["1.389", "432.0", "0.72", "3.0e-04"]
    assert [sdpa["implementation"], flex["implementation"]] == ["sdpa *", "flex"]
    assert [flex["ms"], flex["note"]] == ["-", "no"]
    assert [(r["target"], r["measured"], r["wanted"], r[""]) for r in results] == [
        ("ours", "0.72", "≥ 0.9", "**missed** by 20.0 %"), ("error", "0.0003", "≤ 0.0004", "met"),
        ("elsewhere", "-", "≥ 0.5", "not measured"),
    ]  # fmt: skip
    assert (summary["met"], summary["missed"]) == (["error"], ["ours"])


def test_reading_a_cache_is_no_arithmetic(made):
    rows = [attention_row("ds_ring", 0.004, gbps=3000.0), attention_row("ds_ring tile", 0.004, gbps=2000.0)]
    text, _ = made([section("attention", "decode", rows={"impl": ["ds_ring"]})], decode={"rows": rows})
    ((only,),) = tables(text)
    assert [only["implementation"], only["GB/s"]] == ["ds_ring", "3,000"]
    assert not {"TFLOP/s", "share"} & only.keys()


def test_products_of_old_records_name_their_algorithm(made):
    row = {"case": "down", "rows": 10000, "ms": 7.5, "tflops": 700.0, "sm_clock_mhz": 1320.0, "power_w": None}
    old = row | {"impl": "cuBLASLt", "over_pytorch": 1.02, "configuration": "id 1 tile 2"}
    text, _ = made([section("products", "one")], one={"rows": [row | {"impl": "PyTorch"}, old]})
    ((pytorch, other),) = tables(text)
    assert [pytorch["over PyTorch"], pytorch["algorithm"]] == ["-", "-"]
    assert [other["over PyTorch"], other["algorithm"]] == ["+2.0 %", "id 1 tile 2"]
    assert "W" not in other


def test_counters_of_a_kernel(made):
    whole = {
        "case": "a case", "flops": 1e12, "ms": 2.5257, "sm_clock_mhz": 1635.8, "tensor_busy": 0.769, "useful": 0.9536,
        "sm_cycles_least": 90.0, "sm_cycles_mean": 95.0, "sm_cycles_most": 100.0, "issue_busy": 0.32, "l2_hit": 0.857,
        "stalls": {"long scoreboard": 0.22, "barrier": 0.18, "wait": 0.17, "gmma": 0.05},
    }  # fmt: skip
    bare = {"case": "another", "flops": 1e12, "ms": 1.0}
    ((first, second),) = tables(made([section("profile", "counted")], counted={"rows": [whole, bare]})[0])
    assert [first["ms"], first["tensor"], first["useful"], first["SMs"]] == ["2.526", "76.9%", "0.954", "0.900 / 0.950"]
    assert [first["issue"], first["L2 hits"]] == ["32%", "86%"]
    assert first["warps wait for"] == "long scoreboard 22%, barrier 18%, wait 17%"
    assert [second["ms"], second["tensor"], second["SMs"], second["warps wait for"]] == ["1.000", "-", "-", ""]
    assert "L1" not in first


def test_generation(made):
    record = {
        "layout": "ring2", "gpus": 2, "device": "a GPU", "ttft_ms": 1234.5, "prefill_tokens_per_second": 81004.0,
        "decode_tpot_ms": 9.876, "decode_over_floor": 1.234, "cache_gib_per_rank": 6.1,
        "decode": "sliced", "config": {"ds_ring": {"parallel": {"decode": "auto"}}},
        "completions": [{"prompt_tokens": 100000, "token_ids": [1, 2, 3], "text": ""}],
    }  # fmt: skip
    text, _ = made([section("generation", "said")], said=record)
    ((row,),) = tables(text)
    assert [row["decoding"], row["rows"], row["prompt tokens"], row["new tokens"]] == ["sliced", "1", "100,000", "3"]
    assert [row["first token (ms)"], row["ms a step"], row["x the bytes' time"]] == ["1,234", "9.88", "1.23"]
    assert "a GPU (2 of a host)" in text


def test_comparison_and_scaling(made):
    def document(gpus, **tps):
        degrees = {"ring": "ring_degree", "tp": "tp_size", "dp": "dp_size", "single": "pp_size"}
        rows = [
            compared(f"{name}{gpus}" if name != "single" else name, value, **{degrees[name]: gpus})
            | {"gpus": gpus, "tps_per_gpu": value / gpus}
            for name, value in tps.items()
        ]  # fmt: skip
        return {"rows": rows, "sweep": [*rows, *({**row, "length": 500} for row in rows)]}

    targets = [
        {"what": "against tp", "figure": "tps", "of": {"layout": "ring2", "length": 1000},
         "over": {"layout": "tp2", "length": 1000}, "at_least": 1.2},
        {"what": "shown", "figure": "comm_exposed_ms", "of": {"layout": "ring2"}, "over_figure": "step_ms",
         "at_most": 0.1},
    ]  # fmt: skip
    sections = [
        section("comparison", "two", targets=targets),
        section("scaling", "one", "two", "four", needs=2, rows={"length": [1000]}),
    ]
    text, summary = made(sections, one=document(1, single=500.0), two=document(2, ring=960.0, tp=800.0))
    (ring, _), by_length, results, scaling = tables(text)
    assert [ring["layout"], ring["TPS (tok/s)"], ring["TPOT (ms)"]] == ["ring2", "960", "4.167"]
    assert [row["layout"] for row in by_length] == ["ring2", "tp2"]
    assert [row["measured"] for row in results] == ["1.2", "0.00036"]
    assert summary["met"] == ["against tp", "shown"]
    by_family = {row["layout"]: row for row in scaling}
    assert by_family["single"] == {"layout": "single", "1 GPU": "500 (1.000)", "2 GPUs": "-"}
    assert by_family["ring"] == {"layout": "ring", "1 GPU": "-", "2 GPUs": "480 (0.960)"}
    assert "- About scaling (`benchmarks/results/four.json`): `make four`" in text


def test_scaling_over_gpus_of_different_kinds_names_them(made):
    alone = compared("single", 500.0) | {"gpus": 1, "tps_per_gpu": 500.0, "device": "H100"}
    two = compared("ring2", 960.0, ring_degree=2) | {"gpus": 2, "tps_per_gpu": 480.0, "device": "H200"}
    text, _ = made(
        [section("scaling", "one", "two")], one={"rows": [alone], "sweep": []}, two={"rows": [two], "sweep": []}
    )
    ((first, _),) = tables(text)
    assert first.keys() == {"layout", "1 GPU (H100)", "2 GPUs (H200)"}


def test_latency_and_the_longest_sequence(made):
    rows = latency.add_ratios([timed("single", 10000, 2.0, gpus=1), timed("ring4", 10000, 0.6, ring_degree=4)])
    one = {"rows": rows, "unfit": [{"layout": "single", "length": 131072, "mode": "full"}]}
    longest = {
        "layout": "ring2", "gpus": 2, "dtype": "fp16", "granularity": 0.02, "shortest_not_fitting": 612345,
        "max_positions": 1 << 20, "rows": [],
        "longest": {"length": 601234, "seconds": 31.25, "tokens_per_second": 19239.5, "peak_memory_gib": [77.0, 76.5]},
    }  # fmt: skip
    whole = longest | {"layout": "ring4", "shortest_not_fitting": None}
    text, _ = made([section("latency", "one"), section("longest", "two", "four")], one=one, two=longest, four=whole)
    (single, ring), (two, four) = tables(text)
    assert [single["L = 10,000"], single["L = 131,072"]] == ["2.000", "does not fit"]
    assert [ring["L = 10,000"], ring["L = 131,072"]] == ["0.600 (0.30)", "-"]
    assert [two["longest L that ran"], two["does not fit"], two["tok/s"]] == ["601,234", "612,345", "19,240"]
    assert two["peak GiB a rank"] == "77.0 / 76.5"
    assert four["does not fit"] == "not reached: the model has 1,048,576 positions"
