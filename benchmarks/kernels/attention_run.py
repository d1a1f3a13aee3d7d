"""Rows of the attention benchmark: every case by every implementation, each in turn with a matrix product."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.kernels import attention_check, attention_implementations
from benchmarks.kernels.attention_cases import Case, Inputs, make_inputs
from benchmarks.kernels.attention_timing import Call, time_in_turn

GEMM = (8192, 8192, 32768)
"""(m, k, n) of the fp16 matrix product with which rates are compared."""

Row = dict[str, Any]

COSTS = {"ds_ring": "carry_cost_ms", "ds_ring + merge": "merge_cost_ms"}
WITHOUT_STATE = "ds_ring, no state"
"""The row of a "carry" case without a state. Its time is subtracted from those of ``COSTS``."""


def run(
    cases: Sequence[Case],
    device: torch.device,
    seconds: float,
    report: Callable[[str], None],
    *,
    names: Sequence[str] = (),
    gemm: tuple[int, int, int] = GEMM,
    offered: Callable[
        [Case, torch.device], dict[str, attention_implementations.Prepare]
    ] = attention_implementations.implementations,
) -> Iterator[Row]:
    """A row for every case and implementation, yielded as soon as it is measured.

    Args:
        seconds: how long each implementation, and the product beside it, is sustained.
        names: take implementations with one of these words in their name; empty: all.
        gemm: (m, k, n) of the product.
    """
    product = _product(gemm, device)
    for case in cases:
        found = {n: f for n, f in offered(case, device).items() if not names or any(word in n for word in names)}
        if not found:
            continue
        report(case.label)
        for row in _rows(case, found, product, 2.0 * gemm[0] * gemm[1] * gemm[2], device, seconds):
            report(f"    {row['impl']}: {_summary(row)}")
            yield row


def _product(gemm: tuple[int, int, int], device: torch.device) -> Call:
    m, k, n = gemm
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
    return lambda: a @ b


def _rows(
    case: Case,
    found: dict[str, attention_implementations.Prepare],
    product: Call,
    product_flops: float,
    device: torch.device,
    seconds: float,
) -> Iterator[Row]:
    inputs: Inputs | None = None
    without_state: float | None = None
    for name, prepare in found.items():
        row: Row = {"case": case.label, "impl": name, **vars(case)}
        # An implementation that fails, or a case whose tensors do not fit, is a row with an error. The others go on.
        try:
            inputs = inputs or make_inputs(case, device)
            row |= _measured(prepare, inputs, product, product_flops, seconds)
        except Exception as error:
            row["error"] = _one_line(error)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the next one may need blocks of other sizes
        if name == WITHOUT_STATE:
            without_state = row.get("ms")
        elif case.kind == "carry" and name in COSTS and without_state is not None and "ms" in row:
            row[COSTS[name]] = row["ms"] - without_state
        yield row


def _measured(
    prepare: attention_implementations.Prepare, inputs: Inputs, product: Call, product_flops: float, seconds: float
) -> Row:
    case = inputs.case
    prepared = prepare(inputs)
    rel_error, lse_error = attention_check.errors(*prepared.call(), inputs, prepared.carries)
    timed, beside = time_in_turn(prepared.call, product, seconds, inputs.q.device)
    rate, product_rate = case.flops / timed.seconds, product_flops / beside.seconds
    decode = case.kind == "decode"
    return {
        "ms": 1e3 * timed.seconds,
        "tflops": rate / 1e12,
        "gemm_tflops": product_rate / 1e12,
        "share": rate / product_rate,
        "gbps": case.kv_bytes(inputs.k.element_size()) / timed.seconds / 1e9 if decode else None,
        "rel_error": rel_error,
        "lse_error": lse_error,
        **{name: timed.sensor(name) for name in ("sm_clock_mhz", "power_w")},
        "gemm_clock_mhz": beside.sensor("sm_clock_mhz"),
        "gemm_power_w": beside.sensor("power_w"),
        "detail": prepared.detail,
    }


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def _summary(row: Row) -> str:
    if "error" in row:
        return str(row["error"])
    return f"{row['ms']:.3f} ms, {row['tflops']:.1f} TFLOP/s, {row['share']:.2f} of the product, {row['detail']}"
