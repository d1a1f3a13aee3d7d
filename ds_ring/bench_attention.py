"""One block of attention by every implementation that this machine offers: rates beside a matrix product, and errors.

Implementations and the product are timed in turn, again and again, so that all see the same clock: a chip at its power
limit slows down within a second, and whoever ran first would look faster.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ds_ring.attention import aten
from ds_ring.attention.reference import reference_attention
from ds_ring.attention.spec import AttentionSpec
from ds_ring.hardware import watched_gpu
from ds_ring.kernels import attention512
from ds_ring.kernels.build import unavailable

Attention = Callable[[Tensor, Tensor, Tensor, bool], Tensor]

GEMM = (8192, 8192, 32768)
"""(m, k, n) of the fp16 matrix product that rates are compared with."""

CHECKED_QUERIES = 64


@dataclass(frozen=True)
class Case:
    head_dim: int
    causal: bool
    batch: int
    heads: int
    kv_heads: int
    seq_q: int
    seq_k: int

    @property
    def flops(self) -> float:
        """4 a pair of query and visible key, a head and a dimension; causal masks end at the last key."""
        pairs = self.seq_q * self.seq_k
        if self.causal:
            pairs -= self.seq_q * (self.seq_q - 1) // 2
        return 4.0 * self.batch * self.heads * self.head_dim * pairs


def default_cases() -> list[Case]:
    """Self blocks of the paper's width at three lengths, and zigzag's half blocks on two ranks."""
    cases = []
    for head_dim, heads in ((64, 128), (128, 64), (256, 32), (512, 16)):
        for causal in (False, True):
            cases += [Case(head_dim, causal, 8, heads, heads, 2500, 2500)]
            cases += [Case(head_dim, causal, 2, heads, heads, 10_000, 10_000)]
    cases += [Case(512, True, 1, 16, 16, 32_768, 32_768), Case(512, False, 8, 16, 16, 1250, 2500)]
    return cases


def implementations(case: Case, device: torch.device) -> dict[str, Attention]:
    scale = case.head_dim**-0.5

    def block(kernel: Any) -> Attention:
        return lambda q, k, v, causal: kernel(q, k, v, scale=scale, causal=causal)[0]

    def cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)

    found = {"memory_efficient": block(aten.memory_efficient)}
    if case.head_dim <= aten.FLASH_MAX_HEAD_DIM:
        found |= {"flash": block(aten.flash), "cudnn": cudnn}
    if case.head_dim == attention512.HEAD_DIM and unavailable(device) is None:
        found["ds_ring"] = block(attention512.block)
    return found


def run(cases: list[Case], device: torch.device, seconds: float, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row for every case and implementation; each case is timed for about ``seconds``."""
    rows = []
    gm, gk, gn = GEMM
    a, b = torch.randn(gm, gk, device=device).half(), torch.randn(gk, gn, device=device).half()
    for case in cases:
        report(str(case))
        shape_q = case.batch, case.seq_q, case.heads, case.head_dim
        shape_k = case.batch, case.seq_k, case.kv_heads, case.head_dim
        q, k, v = (torch.randn(shape, device=device).half() for shape in (shape_q, shape_k, shape_k))
        calls: dict[str, Callable[[], Tensor]] = {
            name: partial(f, q, k, v, case.causal) for name, f in implementations(case, device).items()
        }
        errors = {name: _relative_error(call(), q, k, v, case) for name, call in calls.items()}
        with watched_gpu(device) as gpu:
            times = time_in_turn({**calls, "gemm": lambda: a @ b}, seconds)
        gemm = 2.0 * gm * gk * gn / times["gemm"]
        for name in calls:
            rate = case.flops / times[name]
            row = {"impl": name, **vars(case), "ms": 1e3 * times[name], "tflops": rate / 1e12}
            rows.append({**row, "gemm_tflops": gemm / 1e12, "share": rate / gemm, "rel_error": errors[name], **gpu})
    return rows


def time_in_turn(calls: dict[str, Callable[[], Tensor]], seconds: float) -> dict[str, float]:
    """Median seconds of each call, all of them called in turn for about ``seconds``."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    torch.cuda.synchronize()
    while sum(map(sum, samples.values())) < seconds:
        events = []
        for name, call in calls.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            stop.record()
            events.append((name, start, stop))
        torch.cuda.synchronize()
        for name, start, stop in events:
            samples[name].append(start.elapsed_time(stop) / 1e3)
    return {name: statistics.median(values) for name, values in samples.items()}


def _relative_error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, case: Case) -> float:
    """Against fp64, on the last queries of the first row and the heads of its last key/value head."""
    heads = slice(case.heads - case.heads // case.kv_heads, case.heads)
    rows = slice(case.seq_q - min(CHECKED_QUERIES, case.seq_q), case.seq_q)
    spec = AttentionSpec(case.head_dim**-0.5)
    offset = case.seq_k - case.seq_q + rows.start
    want, _ = reference_attention(
        q[:1, rows, heads], k[:1, :, -1:], v[:1, :, -1:], spec=spec, causal=case.causal, q_offset=offset
    )
    return float((out[:1, rows, heads].double() - want).norm() / want.norm())
