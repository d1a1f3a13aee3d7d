"""Peer memory on GPUs of one host: PyTorch's symmetric memory, CUDA streams, and flags that the driver sets and awaits.

Flags are written and awaited by the streams' own operations, not by kernels: a waiting stream holds no SM, and waits
even where a kernel that fills the GPU would leave no room for another.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ds_ring.transport.peer_memory import PeerMemory, Queue, rows_of
from ds_ring.transport.shared import Pending

if TYPE_CHECKING:
    from ds_ring.transport.process_group import ProcessGroupTransport

_HEADER = 4096
_FLAG_SPACING = 16
"""Flags in front of the data, 64 bytes apart."""
_WAIT_UNTIL_AT_LEAST = 0
_WRITE_AFTER_FENCE = 0
_ON_DEVICE = 2


class CudaMemory:
    """``buffers``: every rank's allocation, mapped here; flags first."""

    def __init__(self, buffers: list[Tensor], rank: int, keep: Any) -> None:
        self._buffers, self._rank, self._keep = buffers, rank, keep
        self.nbytes = buffers[rank].numel() - _HEADER

    def data(self, rank: int) -> Tensor:
        return self._buffers[rank][_HEADER:]

    def flag_address(self, rank: int, flag: int) -> int:
        return self._buffers[rank].data_ptr() + 4 * _FLAG_SPACING * flag

    @property
    def rank(self) -> int:
        return self._rank

    def drop(self) -> None:
        """Let go of all that keeps this rank's memory, and its peers' here."""
        self._buffers, self._keep = [], None


class CudaQueue:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream

    def after(self, other: Queue) -> None:
        assert isinstance(other, CudaQueue)
        self.stream.wait_stream(other.stream)

    def copy(self, target: Tensor, source: Tensor) -> None:
        assert target.shape == source.shape
        to, of = rows_of(target), rows_of(source)
        assert to is not None
        assert of is not None
        height, width, _ = max(to, of)  # what is contiguous is one row
        if height == 1:  # which may be longer than a distance between rows can be
            with torch.cuda.stream(self.stream):
                target.copy_(source, non_blocking=True)
            return
        size = source.element_size()
        to_distance, of_distance = (distance if n > 1 else width for n, _, distance in (to, of))
        copy = _Copy2D(
            srcMemoryType=_ON_DEVICE, srcDevice=source.data_ptr(), srcPitch=of_distance * size,
            dstMemoryType=_ON_DEVICE, dstDevice=target.data_ptr(), dstPitch=to_distance * size,
            WidthInBytes=width * size, Height=height,
        )  # fmt: skip
        _checked("cuMemcpy2DAsync_v2", ctypes.byref(copy), ctypes.c_void_p(self.stream.cuda_stream))

    def raise_flag(self, memory: PeerMemory, rank: int, flag: int, value: int) -> None:
        assert isinstance(memory, CudaMemory)
        _driver_call("cuStreamWriteValue32_v2", self.stream, memory.flag_address(rank, flag), value, _WRITE_AFTER_FENCE)

    def wait_flag(self, memory: PeerMemory, flag: int, value: int) -> None:
        assert isinstance(memory, CudaMemory)
        address = memory.flag_address(memory.rank, flag)
        _driver_call("cuStreamWaitValue32_v2", self.stream, address, value, _WAIT_UNTIL_AT_LEAST)

    def mark(self) -> Pending:
        return _Mark(self.stream)


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D of cuda.h."""

    _fields_ = [
        ("srcXInBytes", ctypes.c_size_t), ("srcY", ctypes.c_size_t), ("srcMemoryType", ctypes.c_int),
        ("srcHost", ctypes.c_void_p), ("srcDevice", ctypes.c_uint64), ("srcArray", ctypes.c_void_p),
        ("srcPitch", ctypes.c_size_t),
        ("dstXInBytes", ctypes.c_size_t), ("dstY", ctypes.c_size_t), ("dstMemoryType", ctypes.c_int),
        ("dstHost", ctypes.c_void_p), ("dstDevice", ctypes.c_uint64), ("dstArray", ctypes.c_void_p),
        ("dstPitch", ctypes.c_size_t),
        ("WidthInBytes", ctypes.c_size_t), ("Height", ctypes.c_size_t),
    ]  # fmt: skip


class _Mark:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event()
        self._event.record(stream)

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)


class CudaDevice:
    """``control`` is by whom ranks of the group agree: its gathering of objects holds the host, where a group's own
    barrier may hold the stream alone."""

    def __init__(self, control: ProcessGroupTransport, device: torch.device) -> None:
        self._control, self._device = control, device
        self._streams = [torch.cuda.Stream(device, priority=-1) for _ in range(control.size)]

    def allocate(self, nbytes: int, flags: int) -> PeerMemory:
        assert 4 * _FLAG_SPACING * flags <= _HEADER
        rank, size = self._control.rank, _HEADER + -(-nbytes // _HEADER) * _HEADER
        # What this rank has freed, if anything, is there again only when its peers no longer map it.
        self._meet()
        with torch.inference_mode(False):  # tensors made inside could not be written outside
            # In two steps: in the second, ranks wait for each other. Flags are 0 before anyone can raise one.
            with self._control.together():
                from torch._C._distributed_c10d import _SymmetricMemory
                from torch.distributed._symmetric_memory import rendezvous

                # Not symm_mem.empty: its pool would keep what was outgrown.
                own = _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, self._device)
                own[:_HEADER].zero_()
                torch.cuda.synchronize(self._device)
            with self._control.together():
                handle = rendezvous(own, self._control.group)
                assert handle.rank == rank
                buffers = [
                    own if peer == rank else handle.get_buffer(peer, (size,), torch.uint8)
                    for peer in range(self._control.size)
                ]
        return CudaMemory(buffers, rank, handle)

    def free(self, memory: PeerMemory) -> None:
        assert isinstance(memory, CudaMemory)
        # Peers may still read it, and this rank's streams its flags.
        self._meet()
        memory.drop()

    def _meet(self) -> None:
        """Whatever any rank had queued is done."""
        with self._control.together():
            torch.cuda.synchronize(self._device)

    def computations(self) -> Queue:
        return CudaQueue(torch.cuda.current_stream(self._device))

    def pulls(self, peer: int) -> Queue:
        return CudaQueue(self._streams[peer])


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _driver_call(name: str, stream: torch.cuda.Stream, address: int, value: int, flags: int) -> None:
    stream_address = ctypes.c_void_p(stream.cuda_stream)
    _checked(name, stream_address, ctypes.c_uint64(address), ctypes.c_uint32(value), ctypes.c_uint(flags))


def _checked(name: str, *arguments: Any) -> None:
    code = getattr(_driver(), name)(*arguments)
    if code:
        raise RuntimeError(f"{name} failed with CUDA error {code}")
