"""A transport around another, and how it takes that one's place in a mesh or an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.replaced import replaced
from ds_ring.engine.engine import Engine
from ds_ring.engine.sequence_parallel import SequenceParallelRunner
from ds_ring.parallel.topology import Axis
from ds_ring.transport.base import Message, Pending, Transport
from ds_ring.transport.mesh import Mesh


class WrappedTransport(Transport):
    """Counts into ``inner``'s account, as every transport counts, and moves bytes by ``inner``; subclasses do more or
    less than that. Lanes hand over as they do at ``inner``.

    Shared tensors, and all-to-alls of other forms, are made of what is here, as ``Transport`` has them. A subclass for
    transports with ways of their own brings its own.

    Attributes:
        inner: what is wrapped; it may be a wrapped one itself.
    """

    def __init__(self, inner: Transport) -> None:
        self.inner = inner
        super().__init__(inner.rank, inner.size)
        self.traffic = inner.traffic
        self.name, self.overlaps, self.trades_columns = inner.name, inner.overlaps, inner.trades_columns

    @property
    def real(self) -> Transport:
        """What all wrapping is around."""
        return self.inner.real if isinstance(self.inner, WrappedTransport) else self.inner

    @property
    def beforehand(self) -> Callable[[], None] | None:
        return self.inner.beforehand

    @beforehand.setter
    def beforehand(self, call: Callable[[], None] | None) -> None:
        self.inner.beforehand = call

    @property
    def meanwhile(self) -> Callable[[], None] | None:
        return self.inner.meanwhile

    @meanwhile.setter
    def meanwhile(self, call: Callable[[], None] | None) -> None:
        self.inner.meanwhile = call

    @property
    def shared_bytes(self) -> int:
        return self.inner.shared_bytes

    def self_test(self, device: torch.device) -> None:
        self.inner.self_test(device)

    def reserve(self, shapes: Sequence[Sequence[int]], like: Tensor) -> None:
        self.inner.reserve(shapes, like)

    def send_buffer(self, shape: Sequence[int], like: Tensor) -> Tensor:
        return self.inner.send_buffer(shape, like)

    def _all_gather_bytes(self, data: bytes) -> list[bytes]:
        return self.inner._all_gather_bytes(data)

    def barrier(self) -> None:
        self.inner.barrier()

    def _exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        return self.inner._exchange(sends, receives)

    def _all_to_all(self, send: Tensor) -> Tensor:
        return self.inner._all_to_all(send)

    def _all_reduce(self, tensor: Tensor) -> Tensor:
        return self.inner._all_reduce(tensor)

    def _all_gather(self, tensor: Tensor) -> Tensor:
        return self.inner._all_gather(tensor)

    def _broadcast(self, tensor: Tensor, source: int) -> Tensor:
        return self.inner._broadcast(tensor, source)


Wrap = Callable[[Transport], Transport]


@contextmanager
def wrapped_axes(mesh: Mesh, axes: Iterable[Axis], wrap: Wrap) -> Iterator[None]:
    """Inside the block ``mesh`` has, along ``axes`` of more than one rank, what ``wrap`` makes of its transports."""
    before = {axis: mesh[axis] for axis in axes if mesh[axis].size > 1}
    mesh.transports.update({axis: wrap(transport) for axis, transport in before.items()})
    try:
        yield
    finally:
        mesh.transports.update(before)


@contextmanager
def wrapped_engine(engine: Engine, axes: Iterable[Axis], wrap: Wrap) -> Iterator[None]:
    """As ``wrapped_axes``; slices of weights, which hold on to the transport that sums their results, sum by the
    mesh's."""
    runner = engine.runner
    with ExitStack() as stack:
        stack.enter_context(wrapped_axes(engine.mesh, axes, wrap))
        if isinstance(runner, SequenceParallelRunner) and runner.slices is not None:
            sp = engine.mesh["sp"]
            slices = {name: replace(s, reduce=sp if s.reduce else None) for name, s in runner.slices.items()}
            stack.enter_context(replaced(runner, slices=slices))
        yield
