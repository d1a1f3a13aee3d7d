"""A rank's attention when all the keys it sees have arrived: token ranges of queries against segments of keys."""

# Shapes: B batch, L queries, S keys of a segment, H query heads, K key/value heads, D head_dim.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_ring.attention import sinks
from ds_ring.attention.backends.base import ATTENTION512
from ds_ring.attention.backends.select import select_backend
from ds_ring.attention.block import accumulate_, attend
from ds_ring.attention.spec import AttentionSpec, BlockSpec
from ds_ring.kernels import attention512
from ds_ring.parallel.layout import TokenRange


@dataclass(frozen=True)
class Segment:
    """Keys and values [B, S, K, D] at the global positions ``start .. stop - 1``."""

    start: int
    k_BSKD: Tensor
    v_BSKD: Tensor

    @property
    def stop(self) -> int:
        return self.start + self.k_BSKD.shape[1]


def attend_ranges(
    q_BLHD: Tensor,
    token_ranges: Sequence[TokenRange],
    segments: Sequence[Segment],
    spec: AttentionSpec,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Causal attention by global positions.

    Args:
        q_BLHD: the queries of all ``token_ranges``, one after the other.
        segments: together they hold every position from 0 to the last query's, each once, in any order.
        sinks_H: attention sinks, one a head.

    Returns:
        out [B, L, H, D] in q's dtype.
    """
    if _one_launch(q_BLHD, token_ranges, segments, spec):
        return sinks.apply_(*_attend_segments(q_BLHD, token_ranges, segments, spec), sinks_H)
    if len(segments) == 1:
        k_BSKD, v_BSKD = segments[0].k_BSKD, segments[0].v_BSKD
    else:
        ordered = sorted(segments, key=lambda segment: segment.start)
        k_BSKD = torch.cat([segment.k_BSKD for segment in ordered], dim=1)
        v_BSKD = torch.cat([segment.v_BSKD for segment in ordered], dim=1)
    out_BLHD = torch.empty_like(q_BLHD, memory_format=torch.contiguous_format)
    done = 0
    for token_range in token_ranges:
        tokens = slice(done, done + token_range.length)
        _, lse = attend(
            q_BLHD[:, tokens], k_BSKD[:, : token_range.stop], v_BSKD[:, : token_range.stop],
            spec=spec, q_offset=token_range.start, out=out_BLHD[:, tokens],
        )  # fmt: skip
        sinks.apply_(out_BLHD[:, tokens], lse, sinks_H)
        done = tokens.stop
    return out_BLHD


def accumulate_ranges_(
    out_BLHD: Tensor,
    lse_BHL: Tensor,
    q_BLHD: Tensor,
    token_ranges: Sequence[TokenRange],
    segments: Sequence[Segment],
    spec: AttentionSpec,
) -> None:
    """Fold segments of other keys into a running fp32 result, in place: in one launch where a kernel can, else in one
    call or more for each segment.

    Here keys may be missing: a query sees those keys of ``segments`` whose positions are not after its own.

    Args:
        token_ranges: ascending; none of them begins inside a segment.
    """
    if not segments:
        return
    if _one_launch(q_BLHD, token_ranges, segments, spec):
        attention512.accumulate_(out_BLHD, lse_BHL, *_arguments(q_BLHD, token_ranges, segments, spec))
        return
    done = 0
    for number, token_range in enumerate(token_ranges):
        # A segment before this token range is visible to it and to all later ones whole. Without a window, positions do
        # not matter there, and one call does them all.
        tokens = slice(done, done + token_range.length if spec.window else None)
        before = token_ranges[number - 1].start if number and not spec.window else -1
        for segment in segments:
            if before < segment.start < token_range.start and not _out_of_reach(token_range, segment, spec):
                accumulate_(
                    out_BLHD[:, tokens], lse_BHL[:, :, tokens], q_BLHD[:, tokens], segment.k_BSKD, segment.v_BSKD,
                    spec=spec, causal=spec.window is not None, q_offset=token_range.start, k_offset=segment.start,
                )  # fmt: skip
        done += token_range.length


def _out_of_reach(token_range: TokenRange, segment: Segment, spec: AttentionSpec) -> bool:
    return spec.window is not None and segment.stop - 1 <= token_range.start - spec.window


def _one_launch(
    q_BLHD: Tensor, token_ranges: Sequence[TokenRange], segments: Sequence[Segment], spec: AttentionSpec
) -> bool:
    fits = len(token_ranges) <= attention512.MAX_CHUNKS and len(segments) <= attention512.MAX_SEGMENTS
    return fits and takes_segments(q_BLHD, sum(segment.k_BSKD.shape[1] for segment in segments), spec)


def takes_segments(q_BLHD: Tensor, n_keys: int, spec: AttentionSpec) -> bool:
    """Whether the back-end takes several segments, so that keys need not be copied into the sequence's order."""
    return select_backend(q_BLHD, n_keys, BlockSpec(spec, True, 0)) is ATTENTION512


def _attend_segments(
    q_BLHD: Tensor, token_ranges: Sequence[TokenRange], segments: Sequence[Segment], spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    out, lse = attention512.attention512(*_arguments(q_BLHD, token_ranges, segments, spec))
    return out, lse


def _arguments(
    q_BLHD: Tensor, token_ranges: Sequence[TokenRange], segments: Sequence[Segment], spec: AttentionSpec
) -> attention512.Call:
    chunks: list[int] = []
    done = 0
    for token_range in token_ranges:
        chunks += [done, token_range.length, token_range.start]
        done += token_range.length
    keys, values = [s.k_BSKD for s in segments], [s.v_BSKD for s in segments]
    return q_BLHD, keys, values, [s.start for s in segments], chunks, True, spec.scale
