"""Attention against a cache that is sharded over ranks, each of which holds some tokens with all heads.

A new token is on every rank: each attends to its own shard, and one small all-gather of (out, lse) merges the results.
The tokens of a chunk are spread like the cache. Then either queries travel to the shards (``pass_q``), or shards travel
to the queries (``pass_kv``).
"""

# Shapes: B sequences, L queries on this rank, S slots of one rank, R ranks, H query heads, h a rank's share of them, K
# key/value heads, D head_dim, E = D + 1.
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_ring.attention import sinks
from ds_ring.attention.backends.positions import attend_positions
from ds_ring.attention.block import accumulate_
from ds_ring.attention.merge import merge_, merge_all
from ds_ring.attention.spec import AttentionSpec
from ds_ring.config import RingVariant
from ds_ring.kv_cache.occupancy import SlotRanges
from ds_ring.kv_cache.shard import Cached
from ds_ring.transport.base import Pending, Transport

MANY_QUERIES = 1 << 14
"""Queries, over batch and heads, from which on a kernel that does not split keys fills a GPU: about 128 for each SM of
an H100."""


def attend_replicated(
    q_BLHD: Tensor,
    cached: Cached,
    *,
    q_positions_BL: Tensor,
    spec: AttentionSpec,
    transport: Transport,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Queries that are the same on all ranks, against the keys of all ranks; out [B, L, H, D] in q's dtype, on every
    rank."""
    out, lse = _attend(q_BLHD, cached, q_positions_BL, spec)
    if transport.size > 1:
        out, lse = merge_all(*_unpack(transport.all_gather(_pack(out, lse))))
    return sinks.apply_(out, lse, sinks_H).to(q_BLHD.dtype)


def attend_sliced(
    q_BLhD: Tensor,
    cached: Cached,
    *,
    q_positions_BL: Tensor,
    spec: AttentionSpec,
    transport: Transport,
    sinks_h: Tensor | None = None,
) -> Tensor:
    """Queries of the same tokens on all ranks, each with its own share of the heads, against the keys of all ranks.

    Queries of all heads are gathered on every rank, and an all-to-all returns each head's partial results to its rank;
    out [B, L, h, D] in q's dtype.
    """
    share = q_BLhD.shape[2]
    partials_BLHE = _pack(*_attend(all_heads(q_BLhD, transport), cached, q_positions_BL, spec))
    partials_RBLhE = partials_BLHE.unflatten(2, (transport.size, share)).permute(2, 0, 1, 3, 4).contiguous()
    out, lse = merge_all(*_unpack(transport.all_to_all(partials_RBLhE)))
    return sinks.apply_(out, lse, sinks_h).to(q_BLhD.dtype)


def all_heads(x_BLhD: Tensor, transport: Transport) -> Tensor:
    """[B, L, R h, D] of every rank's share of the heads, in rank order."""
    return transport.all_gather(x_BLhD).permute(1, 2, 0, 3, 4).flatten(2, 3)


def attend_spread(
    q_BLHD: Tensor,
    cached: Cached,
    *,
    q_positions_BL: Tensor,
    held: list[int],
    spec: AttentionSpec,
    transport: Transport,
    seen: Sequence[SlotRanges] = (),
    sinks_H: Tensor | None = None,
    variant: RingVariant = "auto",
) -> Tensor:
    """Queries of this rank's tokens against the keys of all ranks, which include the keys of these tokens.

    Args:
        cached: this rank's slots.
        held: how many slots every rank holds; all ranks have equally many queries.
        seen: ranges of every rank's slots whose keys all queries see (but padding, whose results are not used); between
            and before them are only empty slots. Many queries attend to them faster than by positions.
        variant: ``pass_q``, or ``pass_kv`` one remote shard at a time; ``auto`` takes what sends fewer bytes.
            ``gather_kv``, which is about tokens that are not cached yet, counts as ``pass_kv``.

    Returns:
        out [B, L, H, D] in q's dtype.
    """
    slot_ranges = seen or [()] * transport.size
    if transport.size == 1:
        out, lse = _attend(q_BLHD, cached, q_positions_BL, spec, slot_ranges[0])
    elif variant == "pass_q" or (variant == "auto" and pass_q_bytes(q_BLHD) < pass_kv_bytes(cached, max(held))):
        out, lse = _pass_q(q_BLHD, cached, q_positions_BL, spec, transport, slot_ranges[transport.rank])
    else:
        out, lse = _pass_kv(q_BLHD, cached, q_positions_BL, held, spec, transport, slot_ranges)
    return sinks.apply_(out, lse, sinks_H).to(q_BLHD.dtype)


def pass_q_bytes(q_BLHD: Tensor) -> int:
    """What ``pass_q`` sends to each other rank: the queries, their positions and, back, results in fp32."""
    batch, n_queries, heads, head_dim = q_BLHD.shape
    return q_BLHD.nbytes + batch * n_queries * 4 + batch * n_queries * heads * (head_dim + 1) * 4


def pass_kv_bytes(cached: Cached, slots: int) -> int:
    """What ``pass_kv`` sends to each other rank at ``slots`` slots a rank: keys, values and positions."""
    batch, _, heads, head_dim = cached.k_BSKD.shape
    return batch * slots * (2 * heads * head_dim * cached.k_BSKD.element_size() + 4)


def _attend(
    q_BLHD: Tensor, cached: Cached, q_positions_BL: Tensor, spec: AttentionSpec, seen: SlotRanges = ()
) -> tuple[Tensor, Tensor]:
    if q_BLHD.shape[:3].numel() < MANY_QUERIES:
        seen = ()
    behind = slice(seen[-1].stop if seen else 0, None)
    out_BLHD, lse_BHL = attend_positions(
        q_BLHD, cached.k_BSKD[:, behind], cached.v_BSKD[:, behind],
        q_positions_BL=q_positions_BL, k_positions_BS=cached.positions_BS[:, behind],
        spec=spec, out_dtype=torch.float32,
    )  # fmt: skip
    for slot_range in seen:
        k_BSKD, v_BSKD = cached.k_BSKD[:, slot_range], cached.v_BSKD[:, slot_range]
        accumulate_(out_BLHD, lse_BHL, q_BLHD, k_BSKD, v_BSKD, spec=spec, causal=False)
    return out_BLHD, lse_BHL


def _pass_q(
    q_BLHD: Tensor, cached: Cached, q_positions_BL: Tensor, spec: AttentionSpec, transport: Transport, seen: SlotRanges
) -> tuple[Tensor, Tensor]:
    size, n_queries = transport.size, q_BLHD.shape[1]
    q_BMHD = transport.all_gather(q_BLHD).transpose(0, 1).flatten(1, 2)  # M = R L
    positions_BM = transport.all_gather(q_positions_BL).transpose(0, 1).flatten(1, 2)
    partials_BMHE = _pack(*_attend(q_BMHD, cached, positions_BM, spec, seen))
    partials_RBLHE = partials_BMHE.unflatten(1, (size, n_queries)).transpose(0, 1).contiguous()
    return merge_all(*_unpack(transport.all_to_all(partials_RBLHE)))


def _pass_kv(
    q_BLHD: Tensor,
    cached: Cached,
    q_positions_BL: Tensor,
    held: list[int],
    spec: AttentionSpec,
    transport: Transport,
    seen: Sequence[SlotRanges],
) -> tuple[Tensor, Tensor]:
    """As the ring does it: straight from the owner, and the next shard travels while this one is attended to."""
    rank, size = transport.rank, transport.size
    kv_2BSKD, positions_BS = torch.stack((cached.k_BSKD, cached.v_BSKD)), cached.positions_BS.contiguous()

    def start_hop(hop: int) -> tuple[Pending, Cached, SlotRanges]:
        target, source = (rank + hop) % size, (rank - hop) % size
        slots = held[source]
        incoming_2BSKD = kv_2BSKD.new_empty((2, kv_2BSKD.shape[1], slots, *kv_2BSKD.shape[3:]))
        incoming_BS = positions_BS.new_empty((positions_BS.shape[0], slots))
        sends = [(target, kv_2BSKD), (target, positions_BS)] if held[rank] else []
        receives = [(source, incoming_2BSKD), (source, incoming_BS)] if slots else []
        incoming = Cached(incoming_2BSKD[0], incoming_2BSKD[1], incoming_BS)
        return transport.exchange(sends, receives), incoming, seen[source]

    arriving = start_hop(1)
    out_BLHD, lse_BHL = _attend(q_BLHD, cached, q_positions_BL, spec, seen[rank])
    for hop in range(1, size):
        pending, remote, seen_remote = arriving
        if hop + 1 < size:
            arriving = start_hop(hop + 1)
        pending.wait()
        merge_(out_BLHD, lse_BHL, *_attend(q_BLHD, remote, q_positions_BL, spec, seen_remote))
    return out_BLHD, lse_BHL


def _pack(out_BLHD: Tensor, lse_BHL: Tensor) -> Tensor:
    """[B, L, H, D + 1] fp32: each result followed by its log-sum-exp."""
    return torch.cat((out_BLHD, lse_BHL.transpose(1, 2).unsqueeze(-1)), dim=-1)


def _unpack(parts: Tensor) -> tuple[Tensor, Tensor]:
    """The reverse, with any leading dimensions."""
    return parts[..., :-1], parts[..., -1].transpose(-1, -2)
