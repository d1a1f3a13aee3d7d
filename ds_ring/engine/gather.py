"""Whole results on every rank, from the part of them that each rank holds."""

# Shapes: B sequences, T tokens held by one rank, k kept tokens, * trailing dimensions.
from __future__ import annotations

import torch
from torch import Tensor

from ds_ring.transport.base import Transport
from ds_ring.utils.device import to_device


def assemble(local_BT: Tensor, held: list[Tensor], kept_k: Tensor, transport: Transport) -> Tensor:
    """Values of all kept tokens, on every rank of the group.

    Args:
        local_BT: [B, T, *], this rank's values at the kept tokens it holds, in the order in which it holds them; l = 0
            on a rank that holds none.
        held: for every rank of the group the positions of the tokens it holds, kept or not.
        kept_k: ascending positions of the tokens wanted.

    Returns:
        [B, k, *]; each position once, however many ranks hold it.
    """
    places = [torch.searchsorted(kept_k, positions[torch.isin(positions, kept_k)]) for positions in held]
    most = max(len(place) for place in places)
    buffer = local_BT.new_zeros(local_BT.shape[0], most, *local_BT.shape[2:])
    buffer[:, : local_BT.shape[1]] = local_BT
    whole_Bk = buffer.new_zeros(buffer.shape[0], len(kept_k), *buffer.shape[2:])
    for place, part in zip(places, transport.all_gather(buffer), strict=True):
        whole_Bk[:, to_device(place, whole_Bk.device)] = part[:, : len(place)]
    return whole_Bk


def gather_replicas(sequences: Tensor, count: int, transport: Transport) -> Tensor:
    """All ``count`` sequences of the batch, from each replica's own."""
    if transport.size == 1:
        return sequences
    starts = sequence_starts(count, transport.size)
    buffer = sequences.new_zeros(starts[1] - starts[0], *sequences.shape[1:])
    buffer[: len(sequences)] = sequences
    parts = transport.all_gather(buffer)
    return torch.cat([part[: stop - start] for part, start, stop in zip(parts, starts, starts[1:], strict=False)])


def sequence_starts(count: int, replicas: int) -> list[int]:
    """Where each replica's sequences start, and the end; where they do not divide, earlier replicas take one more."""
    base, extra = divmod(count, replicas)
    return [i * base + min(i, extra) for i in range(replicas + 1)]
