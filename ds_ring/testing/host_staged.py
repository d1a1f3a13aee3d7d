"""Process groups that only move host memory (gloo) under ranks whose tensors are on a GPU: several ranks on one GPU,
which NCCL refuses, in tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_ring.transport.base import Message, Pending
from ds_ring.transport.process_group import ProcessGroupTransport


class _Landing:
    def __init__(self, pending: Pending, receives: Sequence[Message], landed: Sequence[Message]) -> None:
        self._pending, self._receives, self._landed = pending, receives, landed

    def wait(self) -> None:
        self._pending.wait()
        for (_, target), (_, source) in zip(self._receives, self._landed, strict=True):
            target.copy_(source)


class HostStagedTransport(ProcessGroupTransport):
    """``ProcessGroupTransport`` by way of host memory."""

    def _exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        landed = [(peer, torch.empty_like(t, device="cpu")) for peer, t in receives]
        return _Landing(super()._exchange([(peer, t.cpu()) for peer, t in sends], landed), receives, landed)

    def _all_to_all(self, send: Tensor) -> Tensor:
        return super()._all_to_all(send.cpu()).to(send.device)

    def _all_gather(self, tensor: Tensor) -> Tensor:
        return super()._all_gather(tensor.cpu()).to(tensor.device)

    def _all_reduce(self, tensor: Tensor) -> Tensor:
        return super()._all_reduce(tensor.cpu()).to(tensor.device)

    def _broadcast(self, tensor: Tensor, source: int) -> Tensor:
        return super()._broadcast(tensor.cpu(), source).to(tensor.device)
