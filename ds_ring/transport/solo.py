"""Transport of a group with one rank."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ds_ring.transport.base import Done, Message, Pending, T, Transport


class SoloTransport(Transport):
    """A group of one: nothing ever moves."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def _exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        for (_, source), (_, target) in zip(sends, receives, strict=True):
            target.copy_(source)
        return Done()

    def _all_to_all(self, send: Tensor) -> Tensor:
        return send

    def _all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def _all_gather(self, tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(0)

    def all_gather_objects(self, value: T) -> list[T]:
        return [value]

    def barrier(self) -> None:
        return None
