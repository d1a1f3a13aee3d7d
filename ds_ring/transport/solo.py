"""Transport of a group with one rank."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ds_ring.transport.base import Done, Message, Pending, Transport


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

    def _all_gather_bytes(self, data: bytes) -> list[bytes]:
        return [data]

    def barrier(self) -> None:
        return None
