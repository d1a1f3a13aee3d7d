"""PyTorch's ``context_parallel``, ring attention under SDPA, as a baseline."""

# Shapes: B rows, P padded tokens, T of them on this rank.
from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.experimental import _attention, context_parallel
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.baselines.runner import BaselineRunner
from benchmarks.communication.journal import blanks
from benchmarks.replaced import replaced
from ds_ring.config import RunConfig
from ds_ring.errors import DsRingError
from ds_ring.model_dims import ModelDims
from ds_ring.parallel.layout import SequenceLayout
from ds_ring.transport.mesh import Mesh

_ring = sys.modules[_attention._templated_ring_attention.__module__]
"""Where its ring makes what moves K and V (``_create_rotater``); the module has moved between versions."""

ROTATION = {"auto": "allgather", "gather_kv": "allgather", "pass_kv": "alltoall"}
"""Its words for our variants; allgather is its default."""

_create_rotater: Any = getattr(_ring, "_create_rotater", None)


class ContextParallelRunner(BaselineRunner):
    """``ring_impl`` is its load balancing: on for zigzag, off for contiguous."""

    def __init__(
        self, model: PreTrainedModel, run_config: RunConfig, mesh: Mesh, dims: ModelDims, device: torch.device
    ) -> None:
        super().__init__(model, run_config, mesh, dims, device)
        if _create_rotater is None:
            raise DsRingError(f"what context_parallel sends is not to be seen in PyTorch {torch.__version__}")
        group: ProcessGroup = mesh["sp"].group  # type: ignore[attr-defined]
        self._device_mesh = DeviceMesh.from_group(group, device.type)
        self._cut_alike: set[int] = set()

    def layout(self, length: int) -> SequenceLayout:
        p = self.run_config.parallel
        return self._mergeable(SequenceLayout(length, p.ring_degree, ring_impl=p.ring_impl))

    @contextmanager
    def _shared(self, ids_BP: Tensor, position_ids_BP: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        parallel = self.run_config.parallel
        padded = ids_BP.shape[1]
        at_1P = torch.arange(padded, device=self.device)[None]
        buffers = [ids_BP.clone(), position_ids_BP.clone(), at_1P]  # which it cuts in place
        _attention.set_rotate_method(ROTATION[parallel.ring_variant])
        with (
            replaced(_attention._cp_options, enable_load_balance=parallel.ring_impl == "zigzag"),
            replaced(_ring, _create_rotater=self._rotater),
            context_parallel(
                self._device_mesh, buffers=buffers, buffer_seq_dims=[1, 1, 1], no_restore_buffers=set(buffers)
            ),
        ):
            self._check_cut(padded, at_1P)
            yield buffers[0], buffers[1]

    def _check_cut(self, length: int, at_1T: Tensor) -> None:
        """Once a length: that PyTorch cut the sequence as our layout has it."""
        if length in self._cut_alike:
            return
        if not torch.equal(at_1T[0].cpu(), self.held_positions(length, self.mesh["sp"].rank)):
            raise DsRingError(f"PyTorch {torch.__version__} cuts sequences for context_parallel in an unknown way")
        self._cut_alike.add(length)

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: Any
    ) -> tuple[Tensor, None]:
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    def _rotater(self, group: ProcessGroup, seq_dim: int, method: Any = None) -> _Rotater:
        return _Rotater(_create_rotater(group, seq_dim, method), self._count, self.muted)

    def _count(self, buffer: Tensor, is_first: bool) -> None:
        gathers = ROTATION[self.run_config.parallel.ring_variant] == "allgather"
        if gathers and not is_first:
            return
        alike, group = blanks(buffer), self._device_mesh.get_group()

        def again() -> None:
            rotater = _create_rotater(group, 2)
            rotater.exchange_buffers(*alike())
            rotater.next_buffer()

        others = self.mesh["sp"].size - 1 if gathers else 1
        self._account("all_gather" if gathers else "exchange", buffer.nbytes * others, again)


class _Rotater:
    """PyTorch's own, accounted for; muted, it hands back what it was given."""

    def __init__(self, own: Any, count: Callable[[Tensor, bool], None], muted: bool) -> None:
        self._own, self._count, self._muted = own, count, muted
        self._given: Any = None

    def exchange_buffers(self, buffer: Tensor) -> None:
        self._count(buffer, self._given is None)
        self._given = buffer
        if not self._muted:
            self._own.exchange_buffers(buffer)

    def next_buffer(self) -> Tensor:
        return self._given if self._muted else self._own.next_buffer()
