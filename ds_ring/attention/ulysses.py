"""Ulysses: an all-to-all gives each rank the whole slice for some of the heads, and a second one takes the result back.

DeepSpeed-Ulysses, arXiv 2309.14509. A model with fewer key/value heads than ranks has them replicated: each rank
receives just the ones that its query heads attend to.
"""

# Shapes: B batch, T tokens on this rank, L = U T tokens of the slice, H query heads, K key/value heads, h and k a
# rank's part of them, U ranks, D head_dim, W columns of a fused projection.
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor

from ds_ring.attention.qkv_layout import ColumnsByRank, QKVLayout
from ds_ring.transport.base import Transport


class SliceAttention(Protocol):
    """Attention of a whole slice with some of the heads; it writes to ``out`` [B, L, h, D] and returns it."""

    def __call__(self, q_BLhD: Tensor, k_BLkD: Tensor, v_BLkD: Tensor, /, *, out: Tensor | None = None) -> Tensor: ...


def kv_heads_of(ulysses_rank: int, num_heads: int, num_kv_heads: int, degree: int) -> list[int]:
    """Key/value heads that a rank needs for its ``num_heads / degree`` query heads; each serves equally many of them.

    Where the ranks' parts are aligned to the groups of query heads, each head is listed once. Where a part would cut
    through a group, one head is listed per query head, so that grouped-query attention stays regular; the transfer is
    then larger.
    """
    group, share = num_heads // num_kv_heads, num_heads // degree
    needed = [h // group for h in range(ulysses_rank * share, (ulysses_rank + 1) * share)]
    if num_kv_heads % degree == 0 or degree % num_kv_heads == 0:
        return sorted(set(needed))
    return needed


HeadBuffer = tuple[slice, Tensor]
"""(neighbouring heads, the buffer [B, T, n, D] that they are to be written to); its last dimension is contiguous."""


class HeadAllToAll:
    """One layer's all-to-all over heads, of a send buffer in which each rank's heads of q, k and v are side by side.

    Attributes:
        q, k, v: which heads are to be written to which buffer, before ``attend``. A head may go to several buffers.
    """

    memory: Tensor | None = None

    def __init__(self, q_shape: Sequence[int], num_kv_heads: int, like: Tensor, transport: Transport) -> None:
        batch, local, heads, head_dim = q_shape
        degree = transport.size
        share = heads // degree
        wanted = [kv_heads_of(u, heads, num_kv_heads, degree) for u in range(degree)]
        n = len(wanted[0])
        send = transport.send_buffer((degree, batch, local, share + 2 * n, head_dim), like)
        self._transport, self._send, self._sizes = transport, send, (share, n, n)
        self.q: list[HeadBuffer] = [(slice(u * share, (u + 1) * share), send[u, :, :, :share]) for u in range(degree)]
        self.k: list[HeadBuffer] = []
        self.v: list[HeadBuffer] = []
        for u, kv in enumerate(wanted):
            for index, heads_u in _ranges_of(kv):
                for buffers, first in ((self.k, share + index), (self.v, share + n + index)):
                    buffers.append((heads_u, send[u, :, :, first : first + heads_u.stop - heads_u.start]))

    def attend(self, slice_attention: SliceAttention) -> Tensor:
        """out [B, T, H, D] of this rank's tokens, by attention of the whole slice with this rank's heads."""
        transport = self._transport
        q, k, v = transport.all_to_all_side_by_side(self._send).split(self._sizes, dim=2)
        # Where the transport does not own the send buffer, its memory is free from here on.
        del self._send, self.q, self.k, self.v
        return _attend(slice_attention, q, k, v, transport)


class ProjectionAllToAll:
    """As ``HeadAllToAll``, of a fused projection: other ranks read the columns of their heads out of its result.

    Attributes:
        memory: [B, T, W], the send buffer. The projection is to be written to it, and q and k are to be rotated in it,
            before ``attend``.
    """

    def __init__(self, columns: ColumnsByRank, like: Tensor, transport: Transport) -> None:
        self._columns, self._transport = columns.by_rank, transport
        self.memory: Tensor | None = transport.send_buffer(columns.shape, like)
        self.q: list[HeadBuffer] = []
        self.k: list[HeadBuffer] = []
        self.v: list[HeadBuffer] = []

    def attend(self, slice_attention: SliceAttention) -> Tensor:
        """As ``HeadAllToAll.attend``."""
        assert self.memory is not None
        received = self._transport.all_to_all_columns(self.memory, [columns.ranges for columns in self._columns])
        self.memory = None
        q, k, v = self._columns[self._transport.rank].views(received)
        return _attend(slice_attention, q, k, v, self._transport)


def columns_by_rank(
    qkv_layout: QKVLayout, num_heads: int, num_kv_heads: int, transport: Transport
) -> ColumnsByRank | None:
    """What each rank of ``transport`` reads of a projection in place; None where only ``HeadAllToAll`` will do."""
    degree, share = transport.size, num_heads // transport.size
    if not transport.trades_columns:
        return None
    q_heads = [range(u * share, (u + 1) * share) for u in range(degree)]
    heads = [(q, kv_heads_of(u, num_heads, num_kv_heads, degree)) for u, q in enumerate(q_heads)]
    return qkv_layout.columns_by_rank(heads)


def _attend(
    slice_attention: SliceAttention, q_BLhD: Tensor, k_BLkD: Tensor, v_BLkD: Tensor, transport: Transport
) -> Tensor:
    """out [B, T, H, D] of this rank's tokens. The attention writes all tokens' result where other ranks read it."""
    send_BLhD = transport.send_buffer(q_BLhD.shape, q_BLhD)
    return transport.all_to_all_joined(slice_attention(q_BLhD, k_BLkD, v_BLkD, out=send_BLhD))


def _ranges_of(heads: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """``heads`` as ranges of neighbours: (index of the first in ``heads``, the range)."""
    first = 0
    for i in range(1, len(heads) + 1):
        if i == len(heads) or heads[i] != heads[i - 1] + 1:
            yield first, slice(heads[first], heads[i - 1] + 1)
            first = i


def ulysses_attention(
    q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, *, transport: Transport, slice_attention: SliceAttention
) -> Tensor:
    """``slice_attention`` on whole slices, each rank with its part of the heads.

    Args:
        q_BTHD, k_BTKD, v_BTKD: this rank's tokens, all heads; H is a multiple of the group's size.
        transport: the Ulysses axis, in the order in which the ranks' tokens follow each other in the slice.
        slice_attention: of q [B, L, h, D], k [B, L, k, D] and v.

    Returns:
        out [B, T, H, D] for this rank's tokens.
    """
    if transport.size == 1:
        return slice_attention(q_BTHD, k_BTKD, v_BTKD)
    all_to_all = HeadAllToAll(q_BTHD.shape, k_BTKD.shape[2], q_BTHD, transport)
    for x, buffers in ((q_BTHD, all_to_all.q), (k_BTKD, all_to_all.k), (v_BTKD, all_to_all.v)):
        for heads, buffer in buffers:
            buffer.copy_(x[:, :, heads])
    return all_to_all.attend(slice_attention)


def bytes_sent(q_shape: tuple[int, ...], num_kv_heads: int, degree: int, itemsize: int) -> int:
    """Bytes that a rank sends for one call: (U-1)/U of q, of the (replicated) k and v, and of out."""
    batch, local, heads, head_dim = q_shape
    kv_heads = len(kv_heads_of(0, heads, num_kv_heads, degree))
    return batch * local * head_dim * itemsize * 2 * (heads // degree + kv_heads) * (degree - 1)
