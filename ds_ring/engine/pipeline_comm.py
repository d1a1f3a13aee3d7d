"""Hidden states between pipeline stages: the next ones are under way while a stage computes."""

# Shapes: B sequences of a micro-batch, L tokens, d hidden size.
from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from ds_ring.transport.base import Done, Pending, Transport
from ds_ring.transport.shared import PeerPart, SharedTensor

Shape = tuple[int, int, int]


class PipelineComm(ABC):
    """One pass of this stage. For every micro-batch, in the same order on all stages: ``post_receive``, at most one
    ahead, then ``send``."""

    def __init__(self, stages: Transport, shapes: Sequence[Shape], like: Tensor) -> None:
        """``shapes`` of all micro-batches; ``like`` gives dtype and device."""
        self._stages, self._like = stages, like
        self._previous = stages.rank - 1 if stages.rank else None
        self._next = stages.rank + 1 if stages.rank + 1 < stages.size else None

    @abstractmethod
    def post_receive(self, shape: Shape) -> tuple[Tensor | None, Pending]:
        """Hidden states [B, L, d] of the previous stage, to be read after ``Pending.wait``; None on the first stage."""

    @abstractmethod
    def send(self, hidden_BLd: Tensor) -> None:
        """This stage's result of the oldest micro-batch, to the next stage."""

    def finish(self) -> None:  # noqa: B027
        """All micro-batches are done."""


class MessagePipelineComm(PipelineComm):
    def __init__(self, stages: Transport, shapes: Sequence[Shape], like: Tensor) -> None:
        super().__init__(stages, shapes, like)
        self._sent: list[Pending] = []

    def post_receive(self, shape: Shape) -> tuple[Tensor | None, Pending]:
        if self._previous is None:
            return None, Done()
        hidden_BLd = self._like.new_empty(shape)
        return hidden_BLd, self._stages.exchange([], [(self._previous, hidden_BLd)])

    def send(self, hidden_BLd: Tensor) -> None:
        if self._next is None:
            return
        # Two sends in flight at most: more would hold every micro-batch's hidden states at once.
        if len(self._sent) > 1:
            self._sent.pop(0).wait()
        self._sent.append(self._stages.exchange([(self._next, hidden_BLd.contiguous())], []))

    def finish(self) -> None:
        for pending in self._sent:
            pending.wait()


class PulledPipelineComm(PipelineComm):
    """Through memory that the stage behind reads. A message's kernels would wait on SMs, from when it is expected to
    when it has come, and the products beside them take a wave more.

    A slot is opened one micro-batch ahead of the one that is computed. What a stage then waits for
    (``peer_buffers.py``) its neighbours queue for earlier micro-batches: that the one behind has read the last but one,
    which it does before it computes the one before that, and that the one before has written what comes next.
    """

    def __init__(self, stages: Transport, shapes: Sequence[Shape], like: Tensor) -> None:
        super().__init__(stages, shapes, like)
        stages.reserve(shapes, like)
        self._open: deque[SharedTensor] = deque()

    def post_receive(self, shape: Shape) -> tuple[Tensor | None, Pending]:
        shared = self._stages.share(shape, self._like)
        self._open.append(shared)
        if self._previous is None:
            return None, Done()
        pending, hidden_BLd = shared.pull(_whole(self._previous))
        return hidden_BLd, pending

    def send(self, hidden_BLd: Tensor) -> None:
        with self._open.popleft() as shared:
            if self._next is not None:
                shared.own.copy_(hidden_BLd)
            shared.publish([None if self._next is None else _whole(self._next)])


def pipeline_comm(stages: Transport, shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> PipelineComm:
    """For one pass over micro-batches of these shapes, on all stages alike."""
    kind = PulledPipelineComm if stages.overlaps else MessagePipelineComm
    return kind(stages, shapes, torch.empty(0, dtype=dtype, device=device))


def _whole(stage: int) -> PeerPart:
    return stage, (slice(None),)
