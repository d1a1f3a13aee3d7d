"""The matrix products of a decoder layer by every algorithm that cuBLASLt offers, and in panels of rows, sustained.

At the power limit the fastest algorithm is the one that takes the least energy, which a heuristic does not know. All
are tried for a moment; the best of those, and what PyTorch calls, are then timed in turn, each long enough to be warm.
"""

# Shapes: M rows, N columns in, W columns out.
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
        added_MW = residual_MW if case.added else None
        plain = as_pytorch(case, x_MN, weight_WN, bias_W, residual_MW)
        want_MW = plain().clone()

        def error_of(call: Callable[[], object], out_MW: Tensor = out_MW, want_MW: Tensor = want_MW) -> float:
            call()
            synchronize(device)
            return float((out_MW.float() - want_MW.float()).norm() / want_MW.float().norm())

        ways: list[tuple[Callable[[], object], str, dict[str, Any]]] = []
        if finalists:
            found = cublaslt.candidates(x_MN, weight_WN, out_MW, bias_W=bias_W, added_MW=added_MW, gelu=case.gelu)
            watch, quick = stopwatch(device), []
            for candidate in found:
                if (error := error_of(candidate.run)) < SAME:
                    quick.append((quick_seconds(candidate.run, watch), candidate, error))
            quick.sort(key=lambda one: one[0])
            for _, candidate, error in quick[:finalists]:
                numbers = " ".join(f"{name} {value}" for name, value in candidate.configuration.items())
                more = {"heuristic_rank": candidate.rank, "candidates": len(found)}
                ways.append((candidate.run, "cuBLASLt", {"configuration": numbers, "rel_error": error, **more}))
        for panel in (panel for panel in panels if panel < rows):
            by_panels = in_panels(case, panel, x_MN, weight_WN, bias_W, residual_MW, out_MW)
            ways.append((by_panels, f"PyTorch, {panel:,} rows at a time", {"rel_error": error_of(by_panels)}))
        for number, (call, name, facts) in enumerate(ways):
            timed, beside = time_in_turn(call, plain, seconds, device)
            if number == 0:
                yield _row(case, rows, "PyTorch", beside)
            yield {**_row(case, rows, name, timed), **facts, "over_pytorch": beside.seconds / timed.seconds}


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
