"""Who sends how many bytes to whom in a mocked world: along each axis, by pairs of global ranks."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch.distributed as dist
from torch import Tensor

from ds_ring.engine.engine import Engine
from ds_ring.parallel.topology import AXES, Axis
from ds_ring.transport.base import Message, Pending, Transport

Pairs = Counter[tuple[int, int]]
"""(sender, receiver) -> bytes."""


class PeerCounts:
    """Counts of all ranks of a world, which are threads."""

    def __init__(self) -> None:
        self.by_axis: dict[Axis, Pairs] = {axis: Counter() for axis in AXES}
        self._lock = threading.Lock()

    def add(self, axis: Axis, sender: int, receiver: int, sent: float) -> None:
        with self._lock:
            self.by_axis[axis][sender, receiver] += sent

    def watch(self, engine: Engine) -> None:
        """Count what this rank sends from here on, by the transports' own calls."""
        for axis in AXES:
            if engine.mesh.topology.size(axis) > 1:
                self._watch(engine.mesh[axis], axis, engine.mesh.topology.group(axis, engine.mesh.rank))

    def _watch(self, transport: Transport, axis: Axis, ranks: Sequence[int]) -> None:
        own, exchange = ranks[transport.rank], transport.exchange

        def counted_exchange(sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
            for peer, tensor in sends:
                self.add(axis, own, ranks[peer], tensor.nbytes)
            return exchange(sends, receives)

        transport.exchange = counted_exchange
        for name in ("all_to_all", "all_to_all_side_by_side", "all_to_all_joined"):
            setattr(transport, name, self._equal_parts(getattr(transport, name), axis, own, ranks))

    def _equal_parts(self, call: Any, axis: Axis, own: int, ranks: Sequence[int]) -> Any:
        def counted(send: Tensor) -> Tensor:
            for rank in ranks:
                if rank != own:
                    self.add(axis, own, rank, send.nbytes / len(ranks))
            return call(send)

        return counted

    @contextmanager
    def all_reduces(self) -> Iterator[None]:
        """Count AutoTP's all-reduces as those of a ring: 2 (n-1)/n of the tensor to the next rank of the group."""
        module = deepspeed.comm
        real = module.inference_all_reduce

        def counted(tensor: Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
            ranks = dist.get_process_group_ranks(group)
            at = ranks.index(dist.get_rank())
            sent = tensor.nbytes * 2 * (len(ranks) - 1) / len(ranks)
            self.add("tp", ranks[at], ranks[(at + 1) % len(ranks)], sent)
            return real(tensor, *args, group=group, **kwargs)

        module.inference_all_reduce = counted
        try:
            yield
        finally:
            module.inference_all_reduce = real
