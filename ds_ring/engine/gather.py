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


def assemble_ragged(local_M: Tensor, held: list[Tensor], wanted_BL: Tensor, transport: Transport) -> Tensor:
    """Values of the wanted tokens of a batch, sequence by sequence, on every rank of the group.

    Args:
        local_M: [M, *], this rank's values at the wanted tokens it holds: of the first sequence, in the order in which
            it holds them, then of the next.
        held: for every rank of the group the positions of the tokens it holds, wanted or not; each on one rank.
        wanted_BL: which tokens are wanted.
    """
    place_BL = wanted_BL.flatten().cumsum(0).view(wanted_BL.shape) - 1
    places = [place_BL[:, positions][wanted_BL[:, positions]] for positions in held]
    sizes = [len(place) for place in places]
    assert len(local_M) == sizes[transport.rank]
    whole_M = local_M.new_empty(sum(sizes), *local_M.shape[1:])
    whole_M[to_device(torch.cat(places), whole_M.device)] = gather_ragged(local_M, sizes, transport)
    return whole_M


def gather_ragged(local_M: Tensor, sizes: list[int], transport: Transport) -> Tensor:
    """[sum of ``sizes``, *]: every rank's values, in rank order, of which rank i has ``sizes[i]``."""
    if transport.size == 1 or not any(sizes):
        return local_M
    buffer = local_M.new_zeros(max(sizes), *local_M.shape[1:])
    buffer[: len(local_M)] = local_M
    return torch.cat([part[:size] for part, size in zip(transport.all_gather(buffer), sizes, strict=True)])
