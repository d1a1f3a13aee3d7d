"""The shares of a step's time, from a Chrome trace."""

import json

import pytest
import torch

from benchmarks.layouts.profile_trace import Span, categorise, spans, summary, trace_step, union


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT", "gemm"),
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwd>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("attention512_kernel<1, 0>", "attention"),
        ("sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64", "gemm"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("gloo:all_to_all", "communication"),
        ("Memcpy PtoP (Device -> Device)", "copy"),
        ("void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>", "copy"),
        ("void at::native::vectorized_layer_norm_kernel<c10::Half, float>", "elementwise"),
        ("aten::addmm", "gemm"),
        ("aten::gelu", "elementwise"),
    ],
)
def test_kernels_by_name(name, category):
    assert categorise(name) == category


def kernel(name: str, start: float, stop: float, stream: int, cat: str = "kernel") -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": stop - start, "args": {"stream": stream}}


def test_a_copy_under_a_product_is_hidden_and_the_rest_of_it_exposed():
    events = [
        kernel("nvjet", 0, 1000, 7),
        kernel("layer_norm", 1000, 1200, 7),
        kernel("Memcpy PtoP", 900, 1500, 20, "gpu_memcpy"),
        kernel("attention512", 2000, 5000, 7),
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 9000, "tid": 1},
        {"ph": "i", "name": "mark", "ts": 0},
    ]
    assert summary(spans(events), layers=2) == {
        "gemm_ms": 1.0,
        "attention_ms": 3.0,
        "elementwise_ms": 0.2,
        "copy_ms": 0.0,
        "communication_ms": 0.0,
        "idle_ms": 0.8,
        "window_ms": 5.0,
        "transfer_ms": 0.6,
        "transfer_exposed_ms": pytest.approx(0.3),
        "transfer_exposed_ms_per_layer": pytest.approx(0.15),
    }


def test_a_collective_on_the_compute_stream_is_exposed_and_a_local_copy_there_is_none():
    found = summary(
        [
            Span(0, 10, "gemm", "a"),
            Span(10, 30, "communication", "a"),
            Span(30, 34, "copy", "a"),
            Span(20, 26, "elementwise", "b"),
        ],
        layers=1,
    )
    assert found["transfer_exposed_ms"] == found["transfer_ms"] == found["communication_ms"] == pytest.approx(0.020)
    assert found["copy_ms"] == pytest.approx(0.004)
    assert found["idle_ms"] == 0.0


def test_operators_inside_others_count_once():
    def op(name, start, stop, thread=1):
        return {"ph": "X", "cat": "cpu_op", "name": name, "ts": start, "dur": stop - start, "tid": thread}

    events = [
        op("aten::gelu", 0, 100),
        op("aten::addmm", 10, 60),
        op("aten::copy_", 20, 30),
        op("gloo:send", 200, 250, 2),
        op("aten::gelu", 150, 220, 1),
    ]
    found = summary(spans(events), layers=1)
    assert (found["elementwise_ms"], found["gemm_ms"], found["copy_ms"]) == pytest.approx((0.120, 0.040, 0.010))
    assert (found["transfer_ms"], found["transfer_exposed_ms"]) == pytest.approx((0.050, 0.030))
    assert found["idle_ms"] == pytest.approx(0.080)


def test_union():
    assert union([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]


def test_a_step_on_the_cpu_leaves_a_trace_and_its_summary(tmp_path):
    a = torch.randn(300, 300)

    def step() -> None:
        for _ in range(5):
            torch.nn.functional.gelu(a @ a)

    found = trace_step(step, torch.device("cpu"), tmp_path / "deep" / "trace.json", rank=1, layers=5)
    (file,) = (tmp_path / "deep").iterdir()
    assert file.name == "trace.rank1.json"
    assert json.loads(file.read_text())["traceEvents"]
    assert found["gemm_ms"] > 0.0
    assert found["elementwise_ms"] > 0.0
    assert found["transfer_ms"] == 0.0
    parts = sum(found[f"{name}_ms"] for name in ("gemm", "attention", "elementwise", "copy", "communication", "idle"))
    assert parts == pytest.approx(found["window_ms"])


def test_nothing_ran():
    assert summary([], layers=4) == {}
