"""Results compared with fp64 on a sample of queries."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.kernels.attention_cases import Inputs
from ds_ring.attention.reference import reference_attention
from ds_ring.attention.spec import AttentionSpec
from ds_ring.errors import DsRingError

CHECKED_QUERIES = 16


def errors(out: Tensor, lse: Tensor | None, inputs: Inputs, carries: bool) -> tuple[float, float | None]:
    """(relative error of out, error of lse): the worst of the first, middle and last queries of every range.

    Checked are the last sequence of the batch and the query heads of its last key/value head, the far ends of all
    strides. Each group of queries has an error of its own: in causal attention the first results, of few keys, have
    norms many times larger than the last, and would dominate one norm over all. An lse above 1 has a relative error.

    Args:
        carries: the result includes the state of ``inputs``.

    Raises:
        DsRingError: a result that is not finite.
    """
    case = inputs.case
    heads = slice(case.heads - case.heads // case.kv_heads, case.heads)
    k, v = inputs.k[-1:, :, -1:], inputs.v[-1:, :, -1:]
    out_errors, lse_errors = [], []
    done = 0
    for own in case.ranges:
        count = min(CHECKED_QUERIES, own.length)
        for first in sorted({0, (own.length - count) // 2, own.length - count}):
            at = slice(done + first, done + first + count)
            want, want_lse = reference_attention(
                inputs.q[-1:, at, heads], k, v,
                spec=AttentionSpec(case.scale), causal=case.causal, q_offset=own.start + first,
            )  # fmt: skip
            if carries:
                assert inputs.state is not None
                before = inputs.state[0][-1:, at, heads].double(), inputs.state[1][-1:, heads, at].double()
                want, want_lse = _merged(*before, want, want_lse)
            out_errors.append((out[-1:, at, heads].double() - want).norm() / want.norm())
            if lse is not None:
                difference = (lse[-1:, heads, at].double() - want_lse).abs()
                lse_errors.append((difference / want_lse.abs().clamp_min(1.0)).max())
        done += own.length
    worst = [torch.stack(found).max().item() for found in (out_errors, lse_errors) if found]
    if not all(error < float("inf") for error in worst):
        raise DsRingError("the result is not finite")
    return worst[0], worst[1] if lse is not None else None


def _merged(out: Tensor, lse_BHL: Tensor, block_out: Tensor, block_lse_BHL: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.logaddexp(lse_BHL, block_lse_BHL)
    old, new = ((lse - total).exp().transpose(1, 2).unsqueeze(-1) for lse in (lse_BHL, block_lse_BHL))
    return old * out + new * block_out, total
