"""PyTorch's process groups among threads of one process, with ``deepspeed.comm`` on top.

PyTorch's threaded process group does all collectives and sub-groups. It has no messages between two ranks, so these are
added here. A message is copied as late as a real network may copy it, and what is received is NaN until then: a buffer
that is reused or read before ``wait`` shows.
"""

from __future__ import annotations

import sys
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _store_based_barrier
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

from ds_ring.errors import TransportError
from tests.helpers.cores import share_a_core
from tests.helpers.limits import HANG_S

T = TypeVar("T")


class ProcessGroupWorld:
    """``size`` ranks as threads, each with a default process group of its own and ``deepspeed.comm`` on top."""

    def __init__(self, size: int) -> None:
        self.size = size

    def run(self, work: Callable[[int], T]) -> list[T]:
        """``work(rank)`` on every rank at once; results in rank order, or the first error of any rank."""
        store, lock = dist.HashStore(), threading.Lock()

        def one(rank: int) -> T:
            share_a_core()
            dist.init_process_group("mocked", rank=rank, world_size=self.size, store=store)
            try:
                with lock:
                    # One backend object serves all threads: what it calls in torch.distributed is per thread.
                    if not deepspeed.comm.is_initialized():
                        deepspeed.init_distributed(verbose=False)
                return work(rank)
            except BaseException as error:
                ProcessLocalGroup.exception_handle(error)
                raise
            finally:
                dist.destroy_process_group()

        with _per_thread_process_groups(), ThreadPoolExecutor(self.size) as pool:
            futures = [pool.submit(one, rank) for rank in range(self.size)]
        errors = [e for f in futures if (e := f.exception()) is not None]
        # Ranks that were told to stop, or wait in vain, come after the one whose failure is the cause.
        errors.sort(key=lambda e: (isinstance(e, SystemExit), isinstance(e, TransportError)))
        if errors:
            raise errors[0]
        return [f.result() for f in futures]


@contextmanager
def _per_thread_process_groups() -> Iterator[None]:
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    _install_threaded_pg()
    ProcessLocalGroup.reset()
    deepspeed.comm.comm.cdb = None
    try:
        yield
    finally:
        deepspeed.comm.comm.cdb = None
        ProcessLocalGroup.reset()
        _MockedGroup.channels.clear()
        _uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)


class _Message:
    """One send matched with one receive; copied by whichever side waits first once both are there."""

    def __init__(self) -> None:
        self.source: Tensor | None = None
        self.target: Tensor | None = None
        self.matched = threading.Event()
        self._copying, self._copied = threading.Lock(), False

    def wait(self) -> None:
        waited_s = 0.0
        while not self.matched.wait(0.1):
            waited_s += 0.1
            if ProcessLocalGroup._terminate.is_set():
                sys.exit("another rank failed")
            if waited_s > HANG_S:
                raise TransportError("a message was never " + ("received" if self.target is None else "sent"))
        source, target = self.source, self.target
        assert source is not None
        assert target is not None
        with self._copying, torch.inference_mode():
            if (source.shape, source.dtype) != (target.shape, target.dtype):
                raise TransportError(f"{tuple(source.shape)} {source.dtype} sent, {tuple(target.shape)} expected")
            if not self._copied:
                target.copy_(source)
            self._copied = True


class _Channel:
    """Messages from one rank of a group to another, matched in the order in which each side posts them."""

    def __init__(self) -> None:
        self._sends: deque[_Message] = deque()
        self._receives: deque[_Message] = deque()
        self._lock = threading.Lock()

    def send(self, source: Tensor) -> _Message:
        with self._lock:
            message = self._receives.popleft() if self._receives else _Message()
            message.source = source
            self._post(message, self._sends)
        return message

    def receive(self, target: Tensor) -> _Message:
        if target.is_floating_point():
            target.fill_(torch.nan)
        with self._lock:
            message = self._sends.popleft() if self._sends else _Message()
            message.target = target
            self._post(message, self._receives)
        return message

    def _post(self, message: _Message, unmatched: deque[_Message]) -> None:
        if message.source is not None and message.target is not None:
            message.matched.set()
        else:
            unmatched.append(message)


class _MockedGroup(ProcessLocalGroup):
    channels: ClassVar[defaultdict[tuple[str, int, int], _Channel]] = defaultdict(_Channel)
    _making: ClassVar[threading.Lock] = threading.Lock()

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> _Message:
        return self._channel(self._rank, peer).send(tensors[0])

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> _Message:
        return self._channel(peer, self._rank).receive(tensors[0])

    def _channel(self, source: int, target: int) -> _Channel:
        with _MockedGroup._making:
            return _MockedGroup.channels[self.pg_name, source, target]


def _create_mocked_group(store: Any, rank: int, size: int, timeout: timedelta) -> _MockedGroup:
    group = _MockedGroup(rank, size)
    # Collectives are matched by the group's name, so no rank may use the group before all have made it.
    _store_based_barrier(rank, store, "", size, timedelta(seconds=HANG_S))
    return group


dist.Backend.register_backend("mocked", _create_mocked_group, devices=["cpu"])
