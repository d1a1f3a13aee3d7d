"""FlexAttention, compiled for a case with the fastest of a few tile sizes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as fx

from benchmarks.kernels.attention_cases import Case, Inputs
from benchmarks.kernels.attention_timing import quick_seconds, stopwatch
from ds_ring.errors import DsRingError

TUNING_SECONDS = 20.0
"""After this many seconds, mostly of compiling, no more options are tried if one has worked."""


def _tile(m: int, n: int, stages: int, warps: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n, "num_stages": stages, "num_warps": warps}


OPTIONS: dict[int, tuple[dict[str, int], ...]] = {
    64: (_tile(128, 128, 3, 4), _tile(128, 128, 2, 8), _tile(128, 64, 3, 4), _tile(128, 64, 3, 8)),
    128: (_tile(128, 64, 3, 8), _tile(128, 128, 2, 8), _tile(128, 64, 2, 8), _tile(64, 64, 3, 4)),
    256: (_tile(128, 64, 2, 8), _tile(128, 32, 3, 8), _tile(64, 64, 2, 4), _tile(64, 32, 3, 4)),
    512: (_tile(64, 32, 2, 8), _tile(64, 64, 1, 8), _tile(64, 32, 1, 8), _tile(64, 32, 2, 4)),
}
"""By head_dim, the likely fastest first. The first at 64 and 128 and the last at 256 are PyTorch's defaults on Hopper.
Its default at 512 does not fit into shared memory."""

DECODE_OPTIONS: tuple[dict[str, int], ...] = (
    {},
    {"BLOCK_N": 64, "num_stages": 2, "num_warps": 4},
    {"BLOCK_N": 32, "num_stages": 2, "num_warps": 4},
    {"BLOCK_N": 32, "num_stages": 2, "num_warps": 2},
)
"""For one query. PyTorch then uses a kernel that splits the keys and chooses the height of tiles itself."""


def tuned(inputs: Inputs) -> tuple[Callable[[], tuple[Tensor, Tensor]], dict[str, int]]:
    """The fastest call and its options, by a quick timing on the case itself. Options that raise are left out."""
    case, device = inputs.case, inputs.q.device
    # Every compiled variant of a Python function counts towards a limit, after which calls run uncompiled.
    torch._dynamo.reset()
    compiled = torch.compile(fx.flex_attention, dynamic=False, fullgraph=True)
    mask = block_mask(case, device)
    found: list[tuple[float, Callable[[], tuple[Tensor, Tensor]], dict[str, int]]] = []
    failure = ""
    started = time.monotonic()
    for options in DECODE_OPTIONS if case.seq_q == 1 else OPTIONS.get(case.head_dim, ({},)):
        call = _call(compiled, inputs, mask, options)
        try:
            found.append((quick_seconds(call, stopwatch(device)), call, options))
        except Exception as error:  # too little shared memory, a tile size that the template refuses, …
            failure = f"{type(error).__name__}: {error}"  # only its text: its traceback would keep the tensors alive
        if found and time.monotonic() - started > TUNING_SECONDS:
            break
    if not found:
        raise DsRingError(f"no option works, the last gave {failure}")
    _, call, options = min(found, key=lambda entry: entry[0])
    return call, options


def block_mask(case: Case, device: torch.device) -> fx.BlockMask | None:
    if not case.causal:
        return None
    first, *more = case.ranges
    split, before = first.length, first.start
    after = more[0].start - split if more else before

    def visible(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        if after == before:
            return row + before >= key
        return row + torch.where(row < split, before, after) >= key

    return fx.create_block_mask(visible, None, None, case.seq_q, case.seq_k, device=str(device))


def _call(
    compiled: Any, inputs: Inputs, mask: fx.BlockMask | None, options: dict[str, int]
) -> Callable[[], tuple[Tensor, Tensor]]:
    case = inputs.case
    q, k, v = (t.transpose(1, 2) for t in (inputs.q, inputs.k, inputs.v))
    gqa = case.heads != case.kv_heads

    def call() -> tuple[Tensor, Tensor]:
        out, aux = compiled(
            q, k, v, block_mask=mask, scale=case.scale, enable_gqa=gqa, kernel_options=dict(options) or None,
            return_aux=fx.AuxRequest(lse=True),
        )  # fmt: skip
        return out.transpose(1, 2), aux.lse

    return call
