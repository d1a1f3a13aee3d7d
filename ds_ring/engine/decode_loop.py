"""Token after token: every step takes the same launches, which a GPU is told once, as a CUDA graph."""

# Shapes: b rows of this replica, V vocabulary.
from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ds_ring.errors import DsRingError
from ds_ring.kv_cache.shard import KVStore
from ds_ring.kv_cache.step import TokenStep

if TYPE_CHECKING:
    from ds_ring.engine.model_runner import Replica

log = logging.getLogger("ds_ring")

Run = Callable[[], Tensor]


class Decoding:
    """One token more in each row, a call.

    Whatever changes from step to step is in tensors of its own, which the launches read: the tokens, their positions,
    and the slot they get. Until the cache moves the launches stay the same, so the second step after that is
    captured; the first compiles kernels and lets libraries choose theirs.

    Args:
        seen_b1: tokens of each row so far, int64: the next one's position for the model.
        places_b1: the next token's position in the cache, int32. Both are counted on in place.
    """

    def __init__(self, engine: Replica, store: KVStore, seen_b1: Tensor, places_b1: Tensor) -> None:
        self._engine, self._store = engine, store
        self._seen_b1, self._places_b1 = seen_b1, places_b1
        self._ids_b1 = torch.zeros_like(seen_b1)
        self._slot_1 = torch.zeros(1, dtype=torch.long, device=engine.device)
        self._replay: Run | None = None
        self._settled = -1
        """``store.moves`` behind the last step that was not a replay."""

    @torch.inference_mode()
    def __call__(self, ids_b1: Tensor) -> Tensor:
        """Logits [b, V], the same on every rank of the replica, in memory of their own. Nothing waits for the device:
        what is needed on the host is known beforehand."""
        slot = self._store.take_token()
        self._ids_b1.copy_(ids_b1)
        self._slot_1.fill_(slot)
        if self._store.moves != self._settled:
            self._replay = None
            logits_bV = self._run()
            self._settled = self._store.moves
            return logits_bV
        if self._replay is None:
            self._replay = self._engine.capture(self._run)
        return self._run() if self._replay is None else self._replay().clone()

    @torch.inference_mode()
    def again(self) -> None:
        """The last step once more in the slot it had, never as a graph, so that hooks of layers hear of it."""
        self._seen_b1 -= 1
        self._places_b1 -= 1
        self._run()

    def _run(self) -> Tensor:
        engine = self._engine
        step = TokenStep(self._store, self._places_b1, self._slot_1, engine.decodes_sliced)
        logits_bV = engine.decode(self._ids_b1, self._seen_b1, step)
        self._seen_b1 += 1
        self._places_b1 += 1
        return logits_bV


class Capture:
    """Turns a step into a graph of its launches, where the settings and the device allow.

    Args:
        insist: raise where it cannot be done; otherwise a warning says why, once, and steps run as they are.
    """

    def __init__(self, engine: Replica, insist: bool) -> None:
        self._engine, self._insist = engine, insist
        self._works = True

    def __call__(self, run: Run) -> Run | None:
        """What does ``run`` again, in the same memory; None: ``run`` itself must.

        Raises:
            DsRingError: the model asks the device for something in the middle of a step, and ``insist`` is set.
        """
        if not self._works:
            return None
        traffic = self._engine.mesh.traffic
        sent = traffic.bytes_by_op
        before, graph = Counter(sent), torch.cuda.CUDAGraph()
        try:
            # NCCL's own threads may ask the device meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                out = run()
        except Exception as error:  # whatever a model's code trips over
            reason = f"{type(self._engine.model).__name__} cannot be captured in a CUDA graph: {_cause(error)}"
            if self._insist:
                raise DsRingError(f"{reason}; take decode_graph=off") from error
            log.warning("decoding without a CUDA graph: %s", reason)
            self._works = False
            return None
        # A capture counted its bytes and sent none; each replay sends them.
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
    """What went wrong first; that the capture is void then is only its consequence."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error) or type(error).__name__).splitlines()[0]
