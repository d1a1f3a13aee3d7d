"""Ring attention: every rank keeps its queries, keys and values travel, partial results merge by log-sum-exp.

At hop s a rank receives from the rank s places before it and sends to the rank s places after it, straight from the
owner rather than handed on from neighbour to neighbour. On a switch every pair is as near as any other, and only what
the receiver's queries can see has to move: under causal attention half of a zigzag slice to later ranks, nothing of a
contiguous one to earlier ranks. (Ring attention: arXiv 2310.01889; zigzag: the context parallelism of Llama 3, arXiv
2407.21783.)
"""

# Shapes: B batch, L queries of this rank's slice, S keys, H query heads, K key/value heads, D head_dim.
from __future__ import annotations

import torch
from torch import Tensor

from ds_ring.attention import sinks
from ds_ring.attention.local import accumulate_, attend
from ds_ring.attention.runs import Segment, accumulate_runs_, attend_runs, takes_segments
from ds_ring.attention.spec import AttentionSpec
from ds_ring.config import RingVariant
from ds_ring.layout import Block, SequenceLayout
from ds_ring.transport.base import Transport
from ds_ring.transport.shared import Part, Pending, Shared


def ring_attention(
    q_BLHD: Tensor,
    k_BLKD: Tensor,
    v_BLKD: Tensor,
    *,
    layout: SequenceLayout,
    spec: AttentionSpec,
    transport: Transport,
    sinks_H: Tensor | None = None,
    variant: RingVariant = "auto",
    gather_limit_bytes: int = 2 << 30,
) -> Tensor:
    """Causal attention of this rank's slice against the whole sequence.

    Args:
        q_BLHD, k_BLKD, v_BLKD: this ring rank's slice, tokens in the order of ``layout.slice_runs``.
        transport: the ring axis; its rank and size are the ring rank and ``layout.ring_degree``.
        sinks_H: attention sinks, one a head of ``q_BLHD``.
        variant: ``pass_kv`` holds two foreign blocks at a time, ``gather_kv`` all visible K/V of the sequence, in
            exchange for one attention call a run and no merge; ``local_first`` gathers as well, attending to the own
            block meanwhile; ``auto`` gathers while that stays below the limit, in the way that suits the transport, as
            does ``pass_q``, which is about cached keys.

    Returns:
        out [B, L, H, D] in q's dtype.
    """
    assert transport.size == layout.ring_degree
    assert q_BLHD.shape[1] == layout.slice_length
    if transport.size == 1:
        return sinks.apply_(*attend(q_BLHD, k_BLKD, v_BLKD, spec=spec), sinks_H)
    if variant in ("auto", "pass_q"):
        # A property of the layout, so that all ranks decide alike.
        gathered_bytes = 2 * k_BLKD.nbytes * layout.ring_degree
        # With another micro-batch to run meanwhile, or no gain from running on, the cheaper single call is better.
        hides = transport.overlaps and transport.meanwhile is None
        variant = "pass_kv" if gathered_bytes > gather_limit_bytes else "local_first" if hides else "gather_kv"
    run = {"pass_kv": pass_kv, "gather_kv": gather_kv, "local_first": local_first}[variant]
    return run(q_BLHD, k_BLKD, v_BLKD, layout=layout, spec=spec, transport=transport, sinks_H=sinks_H)


def pass_kv(
    q_BLHD: Tensor,
    k_BLKD: Tensor,
    v_BLKD: Tensor,
    *,
    layout: SequenceLayout,
    spec: AttentionSpec,
    transport: Transport,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Block by block into one running result, fp32: the next block travels while the present one is computed."""
    rank, size = transport.rank, transport.size
    with _share(k_BLKD, v_BLKD, layout, transport) as shared:
        arriving = _pull(shared, layout, transport, 1)
        transport.turn()
        out_BLHD, lse_BHL = _own_block(q_BLHD, shared.own, layout, spec, rank)
        for hop in range(1, size):
            pending, block_2BSKD = arriving
            if hop + 1 < size:
                arriving = _pull(shared, layout, transport, hop + 1)
            pending.wait()
            _accumulate(out_BLHD, lse_BHL, q_BLHD, block_2BSKD, _blocks(layout, spec, rank, (rank - hop) % size), spec)
    return sinks.apply_(out_BLHD, lse_BHL, sinks_H).to(q_BLHD.dtype)


def gather_kv(
    q_BLHD: Tensor,
    k_BLKD: Tensor,
    v_BLKD: Tensor,
    *,
    layout: SequenceLayout,
    spec: AttentionSpec,
    transport: Transport,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """All visible K/V first, then one call for all runs of queries: no merge."""
    rank = transport.rank
    with _share(k_BLKD, v_BLKD, layout, transport) as shared:
        runs = layout.slice_runs(rank)
        if shared.places and not takes_segments(q_BLHD, runs[-1].stop, spec):
            pendings, segments = _pull_in_order(shared, layout, transport, own_as_well=True)
        else:
            pendings, segments = _pull_all(shared, layout, transport)
            segments += _segments(layout, rank, *shared.own)
        transport.turn()
        for pending in pendings:
            pending.wait()
        return attend_runs(q_BLHD, runs, segments, spec, sinks_H)


def local_first(
    q_BLHD: Tensor,
    k_BLKD: Tensor,
    v_BLKD: Tensor,
    *,
    layout: SequenceLayout,
    spec: AttentionSpec,
    transport: Transport,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """The own block, which needs nobody, while all visible K/V arrive; then those, continuing its result."""
    rank = transport.rank
    with _share(k_BLKD, v_BLKD, layout, transport) as shared:
        pendings, segments = _pull_all(shared, layout, transport)
        transport.turn()
        out_BLHD, lse_BHL = _own_block(q_BLHD, shared.own, layout, spec, rank)
        for pending in pendings:
            pending.wait()
        accumulate_runs_(out_BLHD, lse_BHL, q_BLHD, layout.slice_runs(rank), segments, spec)
    return sinks.apply_(out_BLHD, lse_BHL, sinks_H).to(q_BLHD.dtype)


def _share(k_BLKD: Tensor, v_BLKD: Tensor, layout: SequenceLayout, transport: Transport) -> Shared:
    """K and V where peers can get at them: each peer's part is the prefix of rows that its queries see."""
    rank, size = transport.rank, transport.size
    shared = transport.share((2, *k_BLKD.shape), k_BLKD)
    shared.own[0].copy_(k_BLKD)
    shared.own[1].copy_(v_BLKD)
    targets = [(rank + hop) % size for hop in range(1, size)]
    shared.publish([_visible(layout, target, rank, target) for target in targets])
    return shared


def _pull(shared: Shared, layout: SequenceLayout, transport: Transport, hop: int) -> tuple[Pending, Tensor]:
    """Take what we see of the rank ``hop`` places back, as [2, B, S, K, D]; nothing seen leaves S = 0."""
    source = (transport.rank - hop) % transport.size
    incoming = _visible(layout, transport.rank, source, source)
    pending, block_2BSKD = shared.pull(incoming)
    return pending, block_2BSKD if incoming else shared.own[:, :, :0]


def _pull_all(shared: Shared, layout: SequenceLayout, transport: Transport) -> tuple[list[Pending], list[Segment]]:
    """Start to take all that this rank's queries see of others: segments to read once all transfers are through."""
    if shared.places:
        return _pull_in_order(shared, layout, transport)
    rank, size = transport.rank, transport.size
    pendings, segments = [], []
    for hop in range(1, size):
        pending, block_2BSKD = _pull(shared, layout, transport, hop)
        pendings.append(pending)
        segments += _segments(layout, (rank - hop) % size, *block_2BSKD)
    return pendings, segments


def _pull_in_order(
    shared: Shared, layout: SequenceLayout, transport: Transport, own_as_well: bool = False
) -> tuple[list[Pending], list[Segment]]:
    """``_pull_all`` into one memory in the sequence's order: few segments, whatever the number of ranks. A kernel works
    in blocks of keys, and every segment ends in a part of one.

    ``own_as_well``: own keys are copied in, and there is one segment.
    """
    rank, size = transport.rank, transport.size
    own_runs = layout.slice_runs(rank)
    _, batch, _, *rest = shared.own.shape
    whole_2BSKD = shared.own.new_empty((2, batch, own_runs[-1].stop, *rest))
    pendings = []
    for hop in range(1, size):
        source = (rank - hop) % size
        incoming = _visible(layout, rank, source, source)
        if incoming is not None:
            seen = [run for run in layout.slice_runs(source) if run.start < own_runs[-1].stop]
            targets = [whole_2BSKD[:, :, run.start : run.stop] for run in seen]
            pendings.append(shared.pull_into(incoming, targets, dim=2))
    if own_as_well:
        for segment in _segments(layout, rank, *shared.own):
            for whole, own in zip(whole_2BSKD, (segment.k_BSKD, segment.v_BSKD), strict=True):
                whole[:, segment.start : segment.stop].copy_(own)
        return pendings, [Segment(0, *whole_2BSKD)]
    edges = [0, *(edge for run in own_runs for edge in (run.start, run.stop))]
    between = [(start, stop) for start, stop in zip(edges[0::2], edges[1::2], strict=False) if start < stop]
    return pendings, [Segment(start, *whole_2BSKD[:, :, start:stop]) for start, stop in between]


def _visible(layout: SequenceLayout, q_rank: int, k_rank: int, peer: int) -> Part | None:
    rows = layout.visible_rows(q_rank, k_rank)
    return (peer, (slice(None), slice(None), slice(0, rows))) if rows else None


def _own_block(
    q_BLHD: Tensor, kv_2BLKD: Tensor, layout: SequenceLayout, spec: AttentionSpec, rank: int
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the rank's queries against its own keys, fp32."""
    first, *rest = _blocks(layout, spec, rank, rank)
    whole = slice(0, q_BLHD.shape[1])
    if first.q_rows == first.k_rows == whole:
        out_BLHD, lse_BHL = attend(q_BLHD, *kv_2BLKD, spec=spec, out_dtype=torch.float32)
    else:
        out_BLHD = torch.zeros_like(q_BLHD, dtype=torch.float32)
        lse_BHL = out_BLHD.new_full((q_BLHD.shape[0], q_BLHD.shape[2], q_BLHD.shape[1]), -torch.inf)
        rest = [first, *rest]
    _accumulate(out_BLHD, lse_BHL, q_BLHD, kv_2BLKD, rest, spec)
    return out_BLHD, lse_BHL


def _segments(layout: SequenceLayout, source: int, k_BSKD: Tensor, v_BSKD: Tensor) -> list[Segment]:
    """The runs of ``source``'s slice, as far as they are there: what is visible is a prefix, in whole runs."""
    found = []
    taken = 0
    for run in layout.slice_runs(source):
        if taken < k_BSKD.shape[1]:
            rows = slice(taken, taken + run.length)
            found.append(Segment(run.start, k_BSKD[:, rows], v_BSKD[:, rows]))
            taken += run.length
    return found


def _blocks(layout: SequenceLayout, spec: AttentionSpec, q_rank: int, k_rank: int) -> list[Block]:
    if spec.window is None:
        return layout.blocks(q_rank, k_rank)
    return layout.windowed_blocks(q_rank, k_rank, spec.window)


def _accumulate(
    out_BLHD: Tensor, lse_BHL: Tensor, q_BLHD: Tensor, kv_2BSKD: Tensor, blocks: list[Block], spec: AttentionSpec
) -> None:
    for block in blocks:
        k_BSKD, v_BSKD = kv_2BSKD[:, :, block.k_rows]
        accumulate_(
            out_BLHD[:, block.q_rows], lse_BHL[:, :, block.q_rows], q_BLHD[:, block.q_rows], k_BSKD, v_BSKD,
            spec=spec, causal=block.causal, q_offset=block.q_offset, k_offset=block.k_offset,
        )  # fmt: skip
