"""The matrix products of a decoder layer by every algorithm that cuBLASLt offers, and in panels of rows, sustained.

At the power limit the fastest algorithm is the one that takes the least energy, which a heuristic does not know. All
are tried for a moment; the best of those, and what PyTorch calls, are then timed in turn, each long enough to be warm.
"""

# Shapes: M rows, N columns in, W columns out.
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import cublaslt
from benchmarks.kernels.attention_timing import quick_seconds, stopwatch, time_in_turn
from ds_ring.model_dims import ModelDims
from ds_ring.utils.device import synchronize

Call = Callable[[], object]
Way = tuple[Call, str, dict[str, Any]]
"""What computes a product, its name, and what its row says besides."""

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


def cases(dims: ModelDims) -> list[Case]:
    """Those of one layer whose MLP has a GELU between two projections."""
    d, wide = dims.hidden_size, dims.intermediate_size
    q, kv = (heads * dims.head_dim for heads in (dims.num_heads, 2 * dims.num_kv_heads))
    return [
        Case("q, k and v", d, q + kv),
        Case("attention's result", q, d),
        Case("attention's result, added", q, d, added=True),
        Case("up, GELU", d, wide, gelu=True),
        Case("down, added", wide, d, added=True),
    ]


def run(
    chosen: list[Case],
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    say: Callable[[str], None],
    finalists: int = FINALISTS,
    panels: Sequence[int] = (),
) -> Iterator[dict[str, Any]]:
    """A row of PyTorch's call and of each other way, case by case.

    Args:
        seconds: how long each is sustained.
        finalists: how many of cuBLASLt's algorithms.
        panels: PyTorch's call for so many rows at a time: inputs that stay in the L2 cache take less energy to fetch,
            and at the power limit that is speed.
    """
    for case in chosen:
        say(f"{case.name}: {rows} x {case.columns_in} x {case.columns_out}")
        x_MN, weight_WN, bias_W, residual_MW = tensors(case, rows, dtype, device)
        out_MW = torch.empty_like(residual_MW)
        plain = as_pytorch(case, x_MN, weight_WN, bias_W, residual_MW)
        error_of = partial(_error, out_MW, plain().clone())
        ways: list[Way] = []
        if finalists:
            added_MW = residual_MW if case.added else None
            found = cublaslt.candidates(x_MN, weight_WN, out_MW, bias_W=bias_W, added_MW=added_MW, gelu=case.gelu)
            ways += _fastest(found, error_of, device)[:finalists]
        for panel in (panel for panel in panels if panel < rows):
            by_panels = in_panels(case, panel, x_MN, weight_WN, bias_W, residual_MW, out_MW)
            ways.append((by_panels, f"PyTorch, {panel:,} rows at a time", {"rel_error": error_of(by_panels)}))
        for number, (call, name, facts) in enumerate(ways):
            timed, beside = time_in_turn(call, plain, seconds, device)
            if number == 0:
                yield _row(case, rows, "PyTorch", beside)
            yield {**_row(case, rows, name, timed), **facts, "over_pytorch": beside.seconds / timed.seconds}


def _fastest(found: list[cublaslt.Candidate], error_of: Callable[[Call], float], device: torch.device) -> list[Way]:
    """Those that compute the same, the fastest of a moment first."""
    watch, quick = stopwatch(device), list[tuple[float, Way]]()
    for one in found:
        if (error := error_of(one.run)) < SAME:
            numbers = " ".join(f"{name} {value}" for name, value in one.configuration.items())
            facts = {"heuristic_rank": one.rank, "candidates": len(found), "configuration": numbers}
            quick.append((quick_seconds(one.run, watch), (one.run, "cuBLASLt", {**facts, "rel_error": error})))
    return [way for _, way in sorted(quick, key=lambda one: one[0])]


def _error(out_MW: Tensor, want_MW: Tensor, call: Call) -> float:
    """Relative, of what ``call`` writes to ``out_MW``."""
    call()
    synchronize(out_MW.device)
    return float((out_MW.float() - want_MW.float()).norm() / want_MW.float().norm())


def tensors(case: Case, rows: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, device=device)).to(dtype)

    weight_WN = random(case.columns_out, case.columns_in, scale=case.columns_in**-0.5)
    return random(rows, case.columns_in), weight_WN, random(case.columns_out), random(rows, case.columns_out)


def as_pytorch(
    case: Case, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, out: Tensor | None = None
) -> Callable[[], Tensor]:
    """What the fused layers call; a residual's bias has been added before, as they do it. In ``out``, if given."""
    if case.gelu:
        return lambda: torch._addmm_activation(bias, x, weight.t(), use_gelu=True, out=out)
    if case.added:
        biased = residual + bias
        return lambda: torch.addmm(biased, x, weight.t(), out=out)
    return lambda: torch.addmm(bias, x, weight.t(), out=out)


def in_panels(
    case: Case, panel: int, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, out: Tensor
) -> Callable[[], None]:
    """The same in ``out``, ``panel`` rows at a time."""
    parts = [t.split(panel) for t in (x, residual, out)]
    calls = [as_pytorch(case, x, weight, bias, residual, out) for x, residual, out in zip(*parts, strict=True)]

    def run() -> None:
        for call in calls:
            call()

    return run


def _row(case: Case, rows: int, impl: str, timed: Any) -> dict[str, Any]:
    return {
        "case": case.name, "rows": rows, "columns_in": case.columns_in, "columns_out": case.columns_out, "impl": impl,
        "ms": 1e3 * timed.seconds, "tflops": case.flops(rows) / timed.seconds / 1e12, "rel_error": None,
        "sm_clock_mhz": timed.sensor("sm_clock_mhz"), "power_w": timed.sensor("power_w"), "configuration": "",
    }  # fmt: skip
