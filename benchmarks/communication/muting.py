"""Transports that count what they are asked to move and leave it out.

A pass without communication must compute as long as one with it, so numbers of some kind stand for those that do not
come: arithmetic on zeros, or on memory as it was found, takes another time. Making them may not take time either: they
are this rank's own where it has any of that shape.
"""

# Shapes: B batch, T tokens on this rank, W columns of a projection, h a rank's share of the heads, D head_dim.
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.communication.wrapped import WrappedTransport
from ds_ring.transport.base import Done, Message, Pending, Transport
from ds_ring.transport.copy_engine import CopyEngineTransport
from ds_ring.transport.shared import PeerPart, SharedTensor, ViewOf


class MutedTransport(WrappedTransport):
    """Leaves out exchanges, all-to-alls and all-reduces: what layers do, and hidden states between stages. All-gathers,
    broadcasts and small Python values, of which results are made, move."""

    def reserve(self, shapes: Sequence[Sequence[int]], like: Tensor) -> None:
        """Nothing will be written where other ranks read it."""

    def send_buffer(self, shape: Sequence[int], like: Tensor) -> Tensor:
        return like.new_empty(tuple(shape))

    def _exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        for _, tensor in receives:
            tensor.normal_()
        return Done()

    def _all_to_all(self, send: Tensor) -> Tensor:
        return send

    def _all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor


class MutedCopyEngine(MutedTransport):
    """Shared tensors are in ordinary memory, and what comes from other ranks is there already: a copy within this
    rank's memory would be a kernel, which the copy engine's transfers are not.

    It keeps numbers of this rank, of an earlier call, for each shape that other ranks would bring.
    """

    def __init__(self, inner: Transport) -> None:
        super().__init__(inner)
        self._stand_ins: dict[tuple[object, ...], Tensor] = {}

    def share(self, shape: Sequence[int], like: Tensor, within: ViewOf | None = None) -> SharedTensor:
        return MutedTensor(self, tuple(shape), like, within)

    def stand_in(self, shape: Sequence[int], own: Tensor, number: int = 0) -> Tensor:
        """What stands for a tensor of ``shape`` from other ranks: at first numbers of ``own``. It is the same memory at
        each call with this shape, dtype and ``number``."""
        key = number, tuple(shape), own.dtype
        if key not in self._stand_ins:
            size = torch.Size(shape).numel()
            times = -(-size // own.numel())
            self._stand_ins[key] = own.reshape(-1).repeat(times)[:size].view(tuple(shape))
        return self._stand_ins[key]

    def _all_to_all_joined(self, send: Tensor) -> Tensor:
        own_BThD = send.unflatten(1, (self.size, -1))[:, self.rank]
        return self._among_stand_ins(own_BThD, 2)

    def _all_to_all_columns(self, memory_BTW: Tensor, columns: Sequence[Sequence[slice]]) -> list[Tensor]:
        own = columns[self.rank]
        return [self._among_stand_ins(memory_BTW[..., those], 1, number) for number, those in enumerate(own)]

    def _among_stand_ins(self, own: Tensor, dim: int, number: int = 0) -> Tensor:
        """All ranks' parts, of the shape of ``own``, side by side along ``dim``."""
        parts = self.stand_in((*own.shape[:dim], self.size, *own.shape[dim:]), own, number)
        parts.select(dim, self.rank).copy_(own)
        return parts.flatten(dim, dim + 1)


class MutedTensor(SharedTensor):
    """A shared tensor that nobody else reads. This rank's own parts stand for those of other ranks, and random normal
    numbers where it has not written its own yet, as in a pipeline."""

    puts = True

    def __init__(self, transport: MutedCopyEngine, shape: tuple[int, ...], like: Tensor, within: ViewOf | None) -> None:
        self._transport = transport
        self.memory = like.new_empty(within.shape if within else shape)
        self.own = within.part(self.memory, shape) if within else self.memory
        self._written = False

    def publish(self, outgoing: Sequence[PeerPart | None]) -> None:
        self._written = True
        self._transport.traffic.add("exchange", sum(self.own[part[1]].nbytes for part in outgoing if part))

    def pull(self, incoming: PeerPart | None) -> tuple[Pending, Tensor]:
        if incoming is None:
            return Done(), self.blank_part(None)
        return Done(), self.own[incoming[1]] if self._written else self.blank_part(incoming).normal_()

    def room(self, shape: Sequence[int]) -> Tensor:
        return self._transport.stand_in(shape, self.own)

    def pull_into(self, incoming: PeerPart, targets: Sequence[Tensor], dim: int) -> Pending:
        return Done()

    def close(self) -> None:
        """Its memory is nobody else's."""


def muted_transport(inner: Transport) -> MutedTransport:
    real = inner.real if isinstance(inner, WrappedTransport) else inner
    return (MutedCopyEngine if isinstance(real, CopyEngineTransport) else MutedTransport)(inner)
