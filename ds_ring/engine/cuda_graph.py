"""A decoding step as a CUDA graph: its kernel launches are captured once and replayed."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from ds_ring.errors import DsRingError
from ds_ring.transport.base import Traffic

log = logging.getLogger("ds_ring")

DecodeStep = Callable[[], Tensor]
"""() -> logits [b, V]"""


class Capture:
    """Captures a step as a graph of its launches, where the settings and the device allow it.

    Args:
        traffic: where each replay's bytes are counted.
        model_class: who to name in an error.
        insist: raise where it cannot be done; otherwise a warning says why, once, and steps run as they are.
    """

    def __init__(self, traffic: Traffic, model_class: str, insist: bool) -> None:
        self._traffic, self._model_class, self._insist = traffic, model_class, insist
        self._works = True

    def __call__(self, step: DecodeStep) -> DecodeStep | None:
        """What repeats ``step``, in the same memory; None: ``step`` itself must be called.

        Raises:
            DsRingError: the model waits for the device in the middle of a step, and ``insist`` is set.
        """
        if not self._works:
            return None
        traffic = self._traffic
        sent = traffic.bytes_by_op
        before, graph = Counter(sent), torch.cuda.CUDAGraph()
        try:
            # NCCL's own threads may ask the device meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                out = step()
        except Exception as error:  # whatever a model's code fails at
            reason = f"{self._model_class} cannot be captured in a CUDA graph: {_cause(error)}"
            if self._insist:
                raise DsRingError(f"{reason}; take decode_graph=off") from error
            log.warning("decoding without a CUDA graph: %s", reason)
            self._works = False
            return None
        # The capture counted bytes and sent none; each replay sends them.
        once = sent - before
        sent.clear()
        sent.update(before)

        def replay() -> Tensor:
            graph.replay()
            sent.update(once)
            traffic.moved_at = time.monotonic()
            return out

        return replay


def _cause(error: BaseException) -> str:
    """The first error: that the capture is void is only its consequence."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error) or type(error).__name__).splitlines()[0]
