"""Ring attention: every rank keeps its queries; keys and values are sent; partial results merge by log-sum-exp.

Which keys are sent when is in ``kv_exchange.py``. Ring attention is arXiv 2310.01889; the zigzag cut is that of Llama
3's context parallelism, arXiv 2407.21783.
"""

# Shapes: B batch, L queries of this rank's slice, S keys, H query heads, K key/value heads, D head_dim.
from __future__ import annotations

import torch
from torch import Tensor

from ds_ring.attention import sinks
from ds_ring.attention.block import accumulate_, attend
from ds_ring.attention.kv_exchange import KVExchange
from ds_ring.attention.segments import accumulate_ranges_, attend_ranges, takes_segments
from ds_ring.attention.spec import AttentionSpec
from ds_ring.config import RingVariant
from ds_ring.parallel.layout import Block, SequenceLayout
from ds_ring.transport.base import Transport


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
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of this rank's slice against the whole sequence.

    Args:
        q_BLHD, k_BLKD, v_BLKD: this ring rank's slice, tokens in the order of ``layout.slice_ranges``.
        transport: the ring axis; its rank and size are the ring rank and ``layout.ring_degree``.
        sinks_H: attention sinks, one a head of ``q_BLHD``.
        variant: ``pass_kv`` holds the blocks of two other ranks at a time. ``gather_kv`` holds all visible K/V of the
            sequence, and needs one attention call a token range and no merge. ``local_first`` gathers as well, and
            attends to this rank's own block during the transfer. ``auto`` takes one of the two that gather, the one
            that suits the transport, where the K/V of all ranks stay below the limit, and else ``pass_kv``; so does
            ``pass_q``, which is about cached keys.
        gather_limit_bytes: of the K/V of all ranks.
        out: memory for the result, [B, L, H, D] in q's dtype; None: new memory.

    Returns:
        out [B, L, H, D] in q's dtype.
    """
    if transport.size == 1:
        return sinks.apply_(*attend(q_BLHD, k_BLKD, v_BLKD, spec=spec, out=out), sinks_H)
    with KVExchange(
        k_BLKD.shape, k_BLKD,
        layout=layout, transport=transport, variant=variant, gather_limit_bytes=gather_limit_bytes,
    ) as exchange:  # fmt: skip
        exchange.write(k_BLKD, v_BLKD)
        exchange.start()
        result = attend_exchange(q_BLHD, exchange, spec, sinks_H)
        return result if out is None else out.copy_(result)


def attend_exchange(q_BLHD: Tensor, exchange: KVExchange, spec: AttentionSpec, sinks_H: Tensor | None = None) -> Tensor:
    """As ``ring_attention``, of keys and values that are in transfer already: ``exchange`` has been started."""
    if exchange.transport.size == 1:
        return sinks.apply_(*attend(q_BLHD, *exchange.own_2BLKD, spec=spec), sinks_H)
    assert q_BLHD.shape[1] == exchange.layout.slice_length
    exchange.transport.yield_lane()
    attend_variant = {"pass_kv": pass_kv, "gather_kv": gather_kv, "local_first": local_first}[exchange.variant]
    return attend_variant(q_BLHD, exchange, spec, sinks_H)


def pass_kv(q_BLHD: Tensor, exchange: KVExchange, spec: AttentionSpec, sinks_H: Tensor | None) -> Tensor:
    """Block by block into one running result, fp32: the next block is in transfer while one is computed.

    In a ring of two whose fp32 result would exceed the limit, a kernel that takes several segments attends to both
    blocks in one call. That saves the fp32 result, and has to wait for the other rank's block.
    """
    layout, rank = exchange.layout, exchange.transport.rank
    large = q_BLHD.numel() * torch.float32.itemsize > exchange.limit_bytes
    if large and exchange.may_gather and takes_segments(q_BLHD, layout.slice_ranges(rank)[-1].stop, spec):
        return gather_kv(q_BLHD, exchange, spec, sinks_H)
    out_BLHD, lse_BHL = _own_block(q_BLHD, exchange.own_2BLKD, layout, spec, rank)
    for source, block_2BSKD in exchange.blocks():
        _accumulate(out_BLHD, lse_BHL, q_BLHD, block_2BSKD, _blocks(layout, spec, rank, source), spec)
        del block_2BSKD  # else three blocks would be held while the next arrives
    return sinks.apply_(out_BLHD, lse_BHL, sinks_H).to(q_BLHD.dtype)


def gather_kv(q_BLHD: Tensor, exchange: KVExchange, spec: AttentionSpec, sinks_H: Tensor | None) -> Tensor:
    """All visible K/V first, then one call for each token range of the queries, or one for all: no merge."""
    token_ranges = exchange.layout.slice_ranges(exchange.transport.rank)
    joined = not takes_segments(q_BLHD, token_ranges[-1].stop, spec)
    return attend_ranges(q_BLHD, token_ranges, exchange.all_segments(joined), spec, sinks_H)


def local_first(q_BLHD: Tensor, exchange: KVExchange, spec: AttentionSpec, sinks_H: Tensor | None) -> Tensor:
    """This rank's own block while all visible K/V of other ranks arrive; then those, into the same running result."""
    layout, rank = exchange.layout, exchange.transport.rank
    out_BLHD, lse_BHL = _own_block(q_BLHD, exchange.own_2BLKD, layout, spec, rank)
    accumulate_ranges_(out_BLHD, lse_BHL, q_BLHD, layout.slice_ranges(rank), exchange.foreign_segments(), spec)
    return sinks.apply_(out_BLHD, lse_BHL, sinks_H).to(q_BLHD.dtype)


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


def _blocks(layout: SequenceLayout, spec: AttentionSpec, q_rank: int, k_rank: int) -> list[Block]:
    if spec.window is None:
        return layout.blocks(q_rank, k_rank)
    return layout.windowed_blocks(q_rank, k_rank, spec.window)


def _accumulate(
    out_BLHD: Tensor, lse_BHL: Tensor, q_BLHD: Tensor, kv_2BSKD: Tensor, blocks: list[Block], spec: AttentionSpec,
) -> None:  # fmt: skip
    for block in blocks:
        k_BSKD, v_BSKD = (t[:, block.k_rows] for t in kv_2BSKD)
        accumulate_(
            out_BLHD[:, block.q_rows], lse_BHL[:, :, block.q_rows], q_BLHD[:, block.q_rows], k_BSKD, v_BSKD,
            spec=spec, causal=block.causal, q_offset=block.q_offset, k_offset=block.k_offset,
        )  # fmt: skip
