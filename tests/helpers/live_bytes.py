"""Bytes of tensors that are alive on this thread, op by op: what an allocator would have to hold."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside the block, of tensors made there.

    Attributes:
        now, peak: bytes of all storages together.
        largest: the largest storage that was made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self._held: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        before = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (self._held[_storage(tensor)] or _storage(tensor) not in before):
                self._hold(tensor)
        self.peak = max(self.peak, self.now)
        return result

    def _hold(self, tensor: Tensor) -> None:
        key, nbytes = _storage(tensor), tensor.untyped_storage().nbytes()
        if not self._held[key]:
            self.now += nbytes
            self.largest = max(self.largest, nbytes)
        self._held[key] += 1
        weakref.finalize(tensor, self._let_go, key, nbytes)

    def _let_go(self, key: int, nbytes: int) -> None:
        self._held[key] -= 1
        if not self._held[key]:
            self.now -= nbytes


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def peak_of(work: Callable[[], object]) -> LiveBytes:
    with torch.inference_mode(), LiveBytes() as live:
        work()
    return live
