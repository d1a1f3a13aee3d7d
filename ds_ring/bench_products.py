"""The matrix products of a decoder layer by every algorithm that cuBLASLt offers, sustained.

At the power limit the fastest algorithm is the one that takes the least energy, which a heuristic does not know. All
are tried for a moment; the best of those, and what PyTorch calls, are then timed in turn, each long enough to be warm.
"""

# Shapes: M rows, N columns in, W columns out.
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_ring.bench_attention.timing import quick_seconds, stopwatch, time_in_turn
from ds_ring.checks import ModelShape
from ds_ring.hardware import synchronize
from ds_ring.kernels import cublaslt

FINALISTS = 3
SAME = 2e-3
"""Relative difference between two algorithms' results in half precision, at most."""


@dataclass(frozen=True)
class Case:
    """``added``: to a residual; ``gelu``: of the result. Both as the fused layers have them."""

    name: str
    columns_in: int
    columns_out: int
    gelu: bool = False
    added: bool = False

    def flops(self, rows: int) -> float:
        return 2.0 * rows * self.columns_in * self.columns_out


def cases(shape: ModelShape) -> list[Case]:
    """Those of one layer whose MLP has a GELU between two projections."""
    d, wide = shape.hidden_size, shape.intermediate_size
    q, kv = (heads * shape.head_dim for heads in (shape.num_heads, 2 * shape.num_kv_heads))
    return [
        Case("q, k and v", d, q + kv),
        Case("attention's result", q, d),
        Case("attention's result, added", q, d, added=True),
        Case("up, GELU", d, wide, gelu=True),
        Case("down, added", wide, d, added=True),
    ]


def run(
    chosen: list[Case], rows: int, dtype: torch.dtype, device: torch.device, seconds: float, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """A row of PyTorch's call and of each finalist, case by case. ``seconds``: how long each is sustained."""
    for case in chosen:
        say(f"{case.name}: {rows} x {case.columns_in} x {case.columns_out}")
        x_MN, weight_WN, bias_W, residual_MW = tensors(case, rows, dtype, device)
        out_MW = torch.empty_like(residual_MW)
        added_MW = residual_MW if case.added else None
        plain = as_pytorch(case, x_MN, weight_WN, bias_W, residual_MW)
        want_MW = plain().clone()
        found = cublaslt.candidates(x_MN, weight_WN, out_MW, bias_W=bias_W, added_MW=added_MW, gelu=case.gelu)
        watch, quick = stopwatch(device), []
        for candidate in found:
            candidate.run()
            synchronize(device)
            error = float((out_MW.float() - want_MW.float()).norm() / want_MW.float().norm())
            if error < SAME:
                quick.append((quick_seconds(candidate.run, watch), candidate, error))
        quick.sort(key=lambda one: one[0])
        for number, (_, candidate, error) in enumerate(quick[:FINALISTS]):
            timed, beside = time_in_turn(candidate.run, plain, seconds, device)
            if number == 0:
                yield _row(case, rows, "PyTorch", beside, {}, None)
            yield {
                **_row(case, rows, "cuBLASLt", timed, candidate.configuration, error),
                "heuristic_rank": candidate.rank,
                "over_pytorch": beside.seconds / timed.seconds,
                "candidates": len(found),
            }


def tensors(case: Case, rows: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, device=device)).to(dtype)

    weight_WN = random(case.columns_out, case.columns_in, scale=case.columns_in**-0.5)
    return random(rows, case.columns_in), weight_WN, random(case.columns_out), random(rows, case.columns_out)


def as_pytorch(case: Case, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Callable[[], Tensor]:
    """What the fused layers call; a residual's bias has been added before, as they do it."""
    if case.gelu:
        return lambda: torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    if case.added:
        biased = residual + bias
        return lambda: torch.addmm(biased, x, weight.t())
    return lambda: torch.addmm(bias, x, weight.t())


def _row(
    case: Case, rows: int, impl: str, timed: Any, configuration: dict[str, int], error: float | None
) -> dict[str, Any]:
    return {
        "case": case.name, "rows": rows, "columns_in": case.columns_in, "columns_out": case.columns_out, "impl": impl,
        "ms": 1e3 * timed.seconds, "tflops": case.flops(rows) / timed.seconds / 1e12, "rel_error": error,
        "sm_clock_mhz": timed.sensor("sm_clock_mhz"), "power_w": timed.sensor("power_w"),
        "configuration": " ".join(f"{name} {value}" for name, value in configuration.items()),
    }  # fmt: skip
