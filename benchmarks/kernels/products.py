"""The matrix products of a decoder layer, whole and a panel of rows at a time, sustained.

Inputs that stay in the L2 cache take less energy to read. At the power limit less energy could mean a higher clock.
"""

# Shapes: M rows (tokens), N columns in, W columns out.
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.attention_timing import Timed, time_in_turn
from ds_ring.model_dims import ModelDims
from ds_ring.utils.device import synchronize


@dataclass(frozen=True)
class Case:
    """A product of a layer. ``added``: to a residual; ``gelu``: of the result. Both as in the fused layers."""

    name: str
    columns_in: int
    columns_out: int
    gelu: bool = False
    added: bool = False

    def flops(self, rows: int) -> float:
        return 2.0 * rows * self.columns_in * self.columns_out


def cases(dims: ModelDims) -> list[Case]:
    """The products of one layer whose MLP is two projections with a GELU between them."""
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
    selected: list[Case],
    rows: int,
    panels: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """A row of each case's whole product, and one of each size of panel.

    Args:
        panels: numbers of rows. Those that are not below ``rows`` are left out.
        seconds: how long each is sustained.
    """
    for case in selected:
        say(f"{case.name}: {rows} x {case.columns_in} x {case.columns_out}")
        x_MN, weight_WN, bias_W, residual_MW = tensors(case, rows, dtype, device)
        out_MW = torch.empty_like(residual_MW)
        whole = as_pytorch(case, x_MN, weight_WN, bias_W, residual_MW)
        want_MW = whole().clone()
        for number, panel in enumerate(panel for panel in panels if panel < rows):
            by_panels = in_panels(case, panel, x_MN, weight_WN, bias_W, residual_MW, out_MW)
            error = _error(by_panels, out_MW, want_MW)
            timed, beside = time_in_turn(by_panels, whole, seconds, device)
            if number == 0:
                yield _row(case, rows, "PyTorch", beside)
            row = _row(case, rows, f"PyTorch, {panel:,} rows at a time", timed)
            yield {**row, "rel_error": error, "over_pytorch": beside.seconds / timed.seconds}


def _error(call: Callable[[], object], out_MW: Tensor, want_MW: Tensor) -> float:
    """Relative error of what ``call`` writes to ``out_MW``."""
    call()
    synchronize(out_MW.device)
    return float((out_MW.float() - want_MW.float()).norm() / want_MW.float().norm())


def tensors(case: Case, rows: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random (x [M, N], weight [W, N], bias [W], residual [M, W])."""

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, device=device)).to(dtype)

    weight_WN = random(case.columns_out, case.columns_in, scale=case.columns_in**-0.5)
    return random(rows, case.columns_in), weight_WN, random(case.columns_out), random(rows, case.columns_out)


def as_pytorch(
    case: Case, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, out: Tensor | None = None
) -> Callable[[], Tensor]:
    """The call of the fused layers, into ``out`` where that is given.

    The bias is added to a residual beforehand, as the fused layers do it."""
    if case.gelu:
        return lambda: torch._addmm_activation(bias, x, weight.t(), use_gelu=True, out=out)
    if case.added:
        biased = residual + bias
        return lambda: torch.addmm(biased, x, weight.t(), out=out)
    return lambda: torch.addmm(bias, x, weight.t(), out=out)


def in_panels(
    case: Case, panel: int, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, out: Tensor
) -> Callable[[], None]:
    """The same into ``out``, ``panel`` rows at a time."""
    panels = [t.split(panel) for t in (x, residual, out)]
    calls = [as_pytorch(case, x, weight, bias, residual, out) for x, residual, out in zip(*panels, strict=True)]

    def run() -> None:
        for call in calls:
            call()

    return run


def _row(case: Case, rows: int, impl: str, timed: Timed) -> dict[str, Any]:
    return {
        "case": case.name, "rows": rows, "columns_in": case.columns_in, "columns_out": case.columns_out, "impl": impl,
        "ms": 1e3 * timed.seconds, "tflops": case.flops(rows) / timed.seconds / 1e12, "rel_error": None,
        "sm_clock_mhz": timed.sensor("sm_clock_mhz"), "power_w": timed.sensor("power_w"),
    }  # fmt: skip
