"""yunchang's ``LongContextAttention`` (USP), Ulysses within a ring, as a baseline.

Its ring keeps the log-sum-exp of PyTorch's kernels in the model's dtype while it merges blocks: in fp16 that costs it
digits, and it is held to the same limit as all others.
"""

# Shapes: B rows, P padded tokens, T of them on this rank.
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import P2POp
from transformers import PreTrainedModel
from yunchang import LongContextAttention
from yunchang.globals import HAS_FLASH_ATTN, PROCESS_GROUP
from yunchang.kernels import AttnType

from benchmarks.baselines.runner import BaselineRunner
from benchmarks.communication.journal import blanks
from benchmarks.replaced import replaced
from ds_ring.config import RunConfig
from ds_ring.model_dims import ModelDims
from ds_ring.parallel.layout import SequenceLayout
from ds_ring.parallel.topology import Axis
from ds_ring.transport.mesh import Mesh
from ds_ring.utils.device import to_device


class YunchangRunner(BaselineRunner):
    """``ring_impl`` is its zigzag ring or its basic one; ring and Ulysses ranks are ordered as ours."""

    def __init__(
        self, model: PreTrainedModel, run_config: RunConfig, mesh: Mesh, dims: ModelDims, device: torch.device
    ) -> None:
        super().__init__(model, run_config, mesh, dims, device)
        # It takes its groups from the process. Its own function would make more, each of which costs GPU memory.
        with replaced(PROCESS_GROUP, ULYSSES_PG=self._group("ulysses"), RING_PG=self._group("ring")):
            self._attention = LongContextAttention(
                ring_impl_type="zigzag" if run_config.parallel.ring_impl == "zigzag" else "basic",
                attn_type=self._kernel,
            )

    def _group(self, axis: Axis) -> Any:
        """Collective; with None it would take all ranks for a group of one."""
        transport = self.mesh[axis]
        return transport.group if transport.size > 1 else torch.distributed.new_subgroups(1)[0]  # type: ignore[attr-defined]

    @property
    def _kernel(self) -> AttnType:
        """The fastest that computes this. Not FA3: the call it gets knows no causality (0.6.4); nor cuDNN's and the
        plain one, which come without a log-sum-exp."""
        if not self._takes_flash:
            return AttnType.TORCH_EFFICIENT
        return AttnType.FA if HAS_FLASH_ATTN else AttnType.TORCH_FLASH

    def layout(self, length: int) -> SequenceLayout:
        p = self.run_config.parallel
        return self._mergeable(SequenceLayout(length, p.ring_degree, p.ulysses_degree, p.ring_impl))

    @contextmanager
    def _shared(self, ids_BP: Tensor, position_ids_BP: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        held_T = to_device(self.held_positions(ids_BP.shape[1], self.mesh["sp"].rank), self.device)
        all_to_all_single = partial(self._all_to_all, _all_to_all_single)
        with replaced(torch.distributed, all_to_all_single=all_to_all_single, batch_isend_irecv=self._exchange):
            yield ids_BP[:, held_T], position_ids_BP[:, held_T]

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: Any
    ) -> tuple[Tensor, None]:
        if self._kernel is AttnType.TORCH_EFFICIENT:  # which takes as many key/value heads as query heads
            key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for t in (key, value))
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        return self._attention(q, k, v, softmax_scale=options.get("scaling"), causal=True), None

    def _exchange(self, operations: list[P2POp]) -> list[Any]:
        """Its ring's messages: as many received as sent, in the same order."""
        hows, alike = [(op.op, op.peer) for op in operations], blanks(*(op.tensor for op in operations))
        group = operations[0].group

        def again() -> None:
            messages = [P2POp(how, tensor, peer, group) for (how, peer), tensor in zip(hows, alike(), strict=True)]
            for request in _batch_isend_irecv(messages):
                request.wait()

        sent, received = ([op.tensor for op in operations if op.op is how] for how in (_isend, _irecv))
        self._account("exchange", sum(t.nbytes for t in sent), again)
        if not self.muted:
            return _batch_isend_irecv(operations)
        for own, other in zip(sent, received, strict=True):
            other.copy_(own)
        return []


_all_to_all_single, _batch_isend_irecv = torch.distributed.all_to_all_single, torch.distributed.batch_isend_irecv
_isend, _irecv = torch.distributed.isend, torch.distributed.irecv
