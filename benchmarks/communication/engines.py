"""What ranks send inside a forward, whoever's layout it is: left out, or recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import get_args

from benchmarks.baselines.runner import BaselineRunner
from benchmarks.communication.autotp import RecordedAllReduces, without_all_reduces
from benchmarks.communication.journal import Journal
from benchmarks.communication.muting import muted_transport
from benchmarks.communication.recording import recorded_transport
from benchmarks.communication.wrapped import wrapped_engine
from benchmarks.replaced import replaced
from ds_ring.engine.engine import Engine
from ds_ring.engine.sequence_parallel import SHARING_AXES, SequenceParallelRunner
from ds_ring.engine.tensor_pipeline import TensorPipelineRunner
from ds_ring.parallel.topology import Axis


@contextmanager
def muted(engine: Engine) -> Iterator[None]:
    """Inside the block forwards leave out all communication inside layers and between stages. It is counted; results
    are meaningless, the time that they take is not."""
    runner = engine.runner
    with ExitStack() as stack:
        if isinstance(runner, SequenceParallelRunner):
            stack.enter_context(wrapped_engine(engine, (*SHARING_AXES, "sp"), muted_transport))
        elif isinstance(runner, TensorPipelineRunner):
            stack.enter_context(wrapped_engine(engine, ("pp",), muted_transport))
            stack.enter_context(without_all_reduces(runner.model))
        else:
            assert isinstance(runner, BaselineRunner)
            stack.enter_context(replaced(runner, muted=True))
        yield


@contextmanager
def recorded(engine: Engine) -> Iterator[Journal]:
    """Yields a journal of all that this rank does inside the block to send and receive. AutoTP's all-reduces, which no
    transport sees, are counted here and nowhere else."""
    journal: Journal = []
    axes: tuple[Axis, ...] = get_args(Axis)
    tensor_parallel = engine.mesh["tp"]
    with ExitStack() as stack:
        if isinstance(engine.runner, BaselineRunner):
            stack.enter_context(replaced(engine.runner, journal=journal))
        else:
            stack.enter_context(wrapped_engine(engine, axes, lambda inner: recorded_transport(inner, journal)))
        if tensor_parallel.size > 1:
            stack.enter_context(RecordedAllReduces(tensor_parallel, journal))
        yield journal
