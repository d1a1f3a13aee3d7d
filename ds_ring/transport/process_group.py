"""Transport over a process group of ``deepspeed.comm``: NCCL on GPUs, gloo on CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from ds_ring.transport.base import Message, Pending, Transport


class _Requests:
    def __init__(self, requests: list[Any], keep: Sequence[Message]) -> None:
        # Holding the tensors keeps their memory from being handed out again while peers still read it.
        self._requests, self._keep = requests, keep

    def wait(self) -> None:
        for request in self._requests:
            request.wait()
        self._keep = ()


class ProcessGroupTransport(Transport):
    """``ranks`` are the global ranks of the group, in group order."""

    name = "process group"

    def __init__(self, group: Any, ranks: Sequence[int], rank: int) -> None:
        super().__init__(rank, len(ranks))
        self.group = group
        self._ranks = tuple(ranks)

    def _exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        operations = [dist.P2POp(dist.isend, t, self._ranks[peer], self.group) for peer, t in sends]
        operations += [dist.P2POp(dist.irecv, t, self._ranks[peer], self.group) for peer, t in receives]
        return _Requests(dist.batch_isend_irecv(operations), (*sends, *receives))

    def _all_to_all(self, send: Tensor) -> Tensor:
        received = torch.empty_like(send)
        dist.all_to_all_single(received, send, group=self.group)
        return received

    def _all_reduce(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def _all_gather(self, tensor: Tensor) -> Tensor:
        gathered = tensor.new_empty((self.size, *tensor.shape))
        dist.all_gather_into_tensor(gathered.view(-1), tensor.view(-1), group=self.group)
        return gathered

    def _broadcast(self, tensor: Tensor, source: int) -> Tensor:
        received = tensor.clone()
        dist.broadcast(received, src=self._ranks[source], group=self.group)
        return received

    def _all_gather_bytes(self, data: bytes) -> list[bytes]:
        nccl = torch.distributed.get_backend(self.group) == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
        lengths = [int(length) for length in self._gathered(torch.tensor([len(data)], device=device))]
        own = torch.zeros(max(lengths), dtype=torch.uint8)
        own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        everyone = self._gathered(own.to(device))
        return [every[:length].cpu().numpy().tobytes() for every, length in zip(everyone, lengths, strict=True)]

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        gathered = [torch.empty_like(tensor) for _ in self._ranks]
        dist.all_gather(gathered, tensor, group=self.group)
        return gathered

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.group)
