"""The all-reduces that DeepSpeed's AutoTP issues by itself: left out, or counted and recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.module_inject.layers import TensorParallel_Layer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.communication.journal import Journal, blanks
from benchmarks.replaced import replaced
from ds_ring.transport.base import Transport


@contextmanager
def without_all_reduces(model: nn.Module) -> Iterator[None]:
    """AutoTP's layers of ``model`` sum nothing over ranks inside the block."""
    with ExitStack() as stack:
        for layer in model.modules():
            if isinstance(layer, TensorParallel_Layer):
                stack.enter_context(replaced(layer, mp_group=None))
        yield


class RecordedAllReduces(TorchDispatchMode):
    """Enters the all-reduces issued inside the block into the account and ``journal``.

    A ring all-reduce over n ranks makes each send 2 (n-1)/n of the tensor; that is what is counted.
    """

    def __init__(self, tensor_parallel: Transport, journal: Journal) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._transport, self._journal = tensor_parallel, journal

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.c10d.allreduce_.default:
            tensors, size = args[0], self._transport.size
            alike, group = blanks(*tensors), getattr(self._transport, "group", None)

            def again() -> None:
                # The operation's own arguments are not to be kept: what they point to is gone after the call.
                for tensor in alike():
                    deepspeed.comm.all_reduce(tensor, group=group)

            self._transport.traffic.add("all_reduce", sum(t.nbytes for t in tensors) * 2 * (size - 1) // size)
            self._journal.append(again)
        return func(*args, **kwargs)
