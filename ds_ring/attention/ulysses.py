"""Ulysses: an all-to-all gives each rank the whole slice for a share of the heads, and another takes it back.

(DeepSpeed-Ulysses, arXiv 2309.14509.) Models with fewer key/value heads than ranks have them replicated, each rank
receiving just the ones its query heads attend to.
"""

# Shapes: B batch, l tokens on this rank, L = U l tokens of the slice, H query heads, K key/value heads, h and k a
# rank's share of them, U ranks, D head_dim.
from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ds_ring.transport.base import Transport

Inner = Callable[[Tensor, Tensor, Tensor], Tensor]


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


def ulysses_attention(q_BlHD: Tensor, k_BlKD: Tensor, v_BlKD: Tensor, *, transport: Transport, inner: Inner) -> Tensor:
    """``inner`` on whole slices and a share of the heads.

    Args:
        q_BlHD, k_BlKD, v_BlKD: this rank's tokens, all heads; H is a multiple of the group's size.
        transport: the Ulysses axis, in the order in which the ranks' tokens follow each other in the slice.
        inner: (q [B, L, h, D], k [B, L, k, D], v) -> out [B, L, h, D].

    Returns:
        out [B, l, H, D] for this rank's tokens.
    """
    degree = transport.size
    if degree == 1:
        return inner(q_BlHD, k_BlKD, v_BlKD)
    batch, local, heads, head_dim = q_BlHD.shape
    share = heads // degree
    wanted = [kv_heads_of(u, heads, k_BlKD.shape[2], degree) for u in range(degree)]
    # One all-to-all for q, k and v, each rank's share of their heads side by side.
    send = transport.send_buffer((degree, batch, local, share + 2 * len(wanted[0]), head_dim), q_BlHD)
    for u, kv in enumerate(wanted):
        send[u, :, :, :share] = q_BlHD[:, :, u * share : (u + 1) * share]
        send[u, :, :, share : share + len(kv)] = k_BlKD[:, :, kv]
        send[u, :, :, share + len(kv) :] = v_BlKD[:, :, kv]
    slice_BLhD = transport.all_to_all_side_by_side(send)
    q, k, v = slice_BLhD.split((share, len(wanted[0]), len(wanted[0])), dim=2)
    out_BLhD = inner(q, k, v)
    send = transport.send_buffer((degree, batch, local, share, head_dim), out_BLhD)
    send.copy_(out_BLhD.view(batch, degree, local, share, head_dim).transpose(0, 1))
    received_UBlhD = transport.all_to_all(send)
    return received_UBlhD.permute(1, 2, 0, 3, 4).reshape(batch, local, heads, head_dim)


def bytes_sent(q_shape: tuple[int, ...], num_kv_heads: int, degree: int, itemsize: int) -> int:
    """What a rank sends for one call: (U-1)/U of q, of the (replicated) k and v, and of out."""
    batch, local, heads, head_dim = q_shape
    kv_heads = len(kv_heads_of(0, heads, num_kv_heads, degree))
    return batch * local * head_dim * itemsize * 2 * (heads // degree + kv_heads) * (degree - 1)
