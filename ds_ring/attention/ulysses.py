"""Ulysses: an all-to-all gives each rank the whole slice for a share of the heads, and another takes it back.

(DeepSpeed-Ulysses, arXiv 2309.14509.) Models with fewer key/value heads than ranks have them replicated, each rank
receiving just the ones its query heads attend to.
"""

# Shapes: B batch, T tokens on this rank, L = U T tokens of the slice, H query heads, K key/value heads, h and k a
# rank's share of them, U ranks, D head_dim.
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor

from ds_ring.attention.qkv_layout import QKVLayout, Shares
from ds_ring.transport.base import Transport


class Inner(Protocol):
    """Attention of whole slices, written to ``out`` [B, L, h, D], and returned."""

    def __call__(self, q_BLhD: Tensor, k_BLkD: Tensor, v_BLkD: Tensor, /, *, out: Tensor | None = None) -> Tensor: ...


def kv_heads_of(ulysses_rank: int, num_heads: int, num_kv_heads: int, degree: int) -> list[int]:
    """Key/value heads a rank needs for its ``num_heads / degree`` query heads, each serving equally many of them.

    Aligned shares come as they are; where a share would cut through a group of query heads, one head is listed per
    query head, so that grouped-query attention stays regular at the price of a larger transfer.
    """
    group, share = num_heads // num_kv_heads, num_heads // degree
    needed = [h // group for h in range(ulysses_rank * share, (ulysses_rank + 1) * share)]
    if num_kv_heads % degree == 0 or degree % num_kv_heads == 0:
        return sorted(set(needed))
    return needed


HeadSlice = tuple[slice, Tensor]
"""Some neighbouring heads of all, and the memory [B, T, n, D] they belong in, its last dimension contiguous."""


class Trade:
    """One layer's all-to-all of heads for tokens: each rank's share of q, k and v side by side, in one send buffer.

    Attributes:
        q, k, v: which heads are to be written where, before ``attend``. A head may be wanted in several places.
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
        self.q: list[HeadSlice] = [(slice(u * share, (u + 1) * share), send[u, :, :, :share]) for u in range(degree)]
        self.k: list[HeadSlice] = []
        self.v: list[HeadSlice] = []
        for u, kv in enumerate(wanted):
            for first, heads_u in _neighbours(kv):
                for parts, at in ((self.k, share + first), (self.v, share + n + first)):
                    parts.append((heads_u, send[u, :, :, at : at + heads_u.stop - heads_u.start]))

    def attend(self, inner: Inner) -> Tensor:
        """``inner`` on whole slices and a share of the heads; out [B, T, H, D] for this rank's tokens."""
        transport = self._transport
        q, k, v = transport.all_to_all_side_by_side(self._send).split(self._sizes, dim=2)
        # Where it is not a transport's own, the send buffer's memory is free from here on.
        del self._send, self.q, self.k, self.v
        return _attend(inner, q, k, v, transport)


class ProjectionTrade:
    """The same of a projection as it lies: peers take the columns of their heads out of ``memory``, [B, T, W].

    ``memory`` is to be written, and queries and keys turned in it, before ``attend``.
    """

    def __init__(self, shares: Shares, like: Tensor, transport: Transport) -> None:
        self._shares, self._transport = shares.by_rank, transport
        self.memory: Tensor | None = transport.send_buffer(shares.shape, like)
        self.q: list[HeadSlice] = []
        self.k: list[HeadSlice] = []
        self.v: list[HeadSlice] = []

    def attend(self, inner: Inner) -> Tensor:
        """As ``Trade.attend``."""
        assert self.memory is not None
        blocks = self._transport.all_to_all_columns(self.memory, [share.columns for share in self._shares])
        self.memory = None
        q, k, v = self._shares[self._transport.rank].views(blocks)
        return _attend(inner, q, k, v, self._transport)


def shares_of(qkv_layout: QKVLayout, num_heads: int, num_kv_heads: int, transport: Transport) -> Shares | None:
    """Each rank's columns; None where it has to be ``Trade``."""
    degree, share = transport.size, num_heads // transport.size
    if not transport.trades_columns:
        return None
    q_heads = [range(u * share, (u + 1) * share) for u in range(degree)]
    return qkv_layout.shares([(q, kv_heads_of(u, num_heads, num_kv_heads, degree)) for u, q in enumerate(q_heads)])


def _attend(inner: Inner, q_BLhD: Tensor, k_BLkD: Tensor, v_BLkD: Tensor, transport: Transport) -> Tensor:
    """[B, T, H, D] of this rank's tokens. The result of all tokens is written where peers take it."""
    send_BLhD = transport.send_buffer(q_BLhD.shape, q_BLhD)
    return transport.all_to_all_joined(inner(q_BLhD, k_BLkD, v_BLkD, out=send_BLhD))


def _neighbours(heads: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """``heads`` as runs of neighbours: (place of the first, the heads)."""
    first = 0
    for i in range(1, len(heads) + 1):
        if i == len(heads) or heads[i] != heads[i - 1] + 1:
            yield first, slice(heads[first], heads[i - 1] + 1)
            first = i


def ulysses_attention(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, *, transport: Transport, inner: Inner) -> Tensor:
    """``inner`` on whole slices and a share of the heads.

    Args:
        q_BTHD, k_BTKD, v_BTKD: this rank's tokens, all heads; H is a multiple of the group's size.
        transport: the Ulysses axis, in the order in which the ranks' tokens follow each other in the slice.
        inner: of q [B, L, h, D], k [B, L, k, D] and v.

    Returns:
        out [B, T, H, D] for this rank's tokens.
    """
    if transport.size == 1:
        return inner(q_BTHD, k_BTKD, v_BTKD)
    trade = Trade(q_BTHD.shape, k_BTKD.shape[2], q_BTHD, transport)
    for x, parts in ((q_BTHD, trade.q), (k_BTKD, trade.k), (v_BTKD, trade.v)):
        for heads, memory in parts:
            memory.copy_(x[:, :, heads])
    return trade.attend(inner)


def bytes_sent(q_shape: tuple[int, ...], num_kv_heads: int, degree: int, itemsize: int) -> int:
    """What a rank sends for one call: (U-1)/U of q, of the (replicated) k and v, and of out."""
    batch, local, heads, head_dim = q_shape
    kv_heads = len(kv_heads_of(0, heads, num_kv_heads, degree))
    return batch * local * head_dim * itemsize * 2 * (heads // degree + kv_heads) * (degree - 1)
