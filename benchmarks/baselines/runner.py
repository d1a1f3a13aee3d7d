"""Other implementations of sequence parallelism on the same model and batch, for comparison.

They run transformers' own layers with its SDPA; only how ranks share a sequence is theirs. What they send passes
through us, so that it is counted, and can be left out or recorded (``communication/engines.py``) as in our layouts.
"""

# Shapes: B rows, L tokens of the batch, P padded to the layout, T tokens on this rank, k kept ones.
from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from benchmarks.baselines import rules
from benchmarks.baselines.attention import attach
from benchmarks.communication.journal import Journal, blanks
from ds_ring.config import RunConfig
from ds_ring.engine.batch import Batch
from ds_ring.engine.model_runner import Finish, ModelRunner, Shard, unchanged
from ds_ring.engine.sequence_parallel import positions_of
from ds_ring.errors import UnsupportedModelError
from ds_ring.model_dims import ModelDims
from ds_ring.parallel.layout import SequenceLayout
from ds_ring.utils.device import to_device

Shared = AbstractContextManager[tuple[Tensor, Tensor]]

FLASH_HEAD_DIM = 256
LSE_ROWS = 32
"""The memory-efficient kernel, which serves what flash does not, pads its log-sum-exp to a multiple of this; merging
needs as many as there are queries."""


class BaselineRunner(ModelRunner):
    """Whole forwards by another implementation; ``model`` must be whole.

    Attributes:
        muted: whether what this rank sends is only counted, and tensors of its own stand for those of other ranks.
        journal: gets what this rank does to send and receive.
    """

    result_axis = "sp"
    muted = False
    journal: Journal | None = None
    _calls = 0

    @abstractmethod
    def layout(self, length: int) -> SequenceLayout:
        """Who holds which tokens."""

    @abstractmethod
    def _shared(self, ids_BP: Tensor, position_ids_BP: Tensor) -> Shared:
        """This rank's part [B, T] of both inside a block in which the baseline's attention works."""

    @abstractmethod
    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: Any
    ) -> tuple[Tensor, None]:
        """The baseline's attention, as transformers calls one."""

    @classmethod
    def check(cls, run_config: RunConfig, dims: ModelDims, device_type: str) -> None:
        rules.check(run_config, dims)
        rules.check_device(run_config, device_type)

    def _inject(self, model: PreTrainedModel) -> None:
        attach(model, self.run_config.benchmark.implementation, self._counted)

    def _counted(self, *args: Any, **options: Any) -> tuple[Tensor, None]:
        self._calls += 1
        return self._attend(*args, **options)

    @property
    def layers(self) -> range:
        return range(self.dims.num_layers)

    def held_positions(self, length: int, rank: int) -> Tensor:
        return positions_of(self.layout(length), *divmod(rank, self.run_config.parallel.ulysses_degree))

    @property
    def _takes_flash(self) -> bool:
        """Whether PyTorch's flash kernel serves this model; otherwise its memory-efficient one does."""
        return self.dims.head_dim <= FLASH_HEAD_DIM and self.run_config.dtype != "fp32"

    def _mergeable(self, layout: SequenceLayout) -> SequenceLayout:
        """``layout`` of a sequence so long that a ring over PyTorch's kernels can merge its chunks."""
        unit = layout.multiple * (1 if self._takes_flash else LSE_ROWS)
        return replace(layout, length=-(-layout.length // unit) * unit)

    def _all_to_all(
        self, own: Callable[..., Any], output: Tensor, tensor: Tensor, group: Any = None, **options: Any
    ) -> Any:
        """``own``, the baseline's exchange of equal parts, counted. Muted, it returns what it was given."""
        alike, size = blanks(output, tensor), torch.distributed.get_world_size(group)
        self._account("all_to_all", tensor.nbytes * (size - 1) // size, lambda: own(*alike(), group=group))
        if self.muted:
            return output.copy_(tensor)  # arithmetic on garbage takes another time than on numbers
        return own(output, tensor, group=group, **options)

    def _account(self, operation: str, sent: int, again: Callable[[], object]) -> None:
        """To be called before sending. ``again`` moves as many bytes once more."""
        self.mesh.traffic.add(operation, sent)
        if self.journal is not None:
            self.journal.append(again)

    def run_micro_batches(
        self, micro_batches: list[Batch], keep: list[Tensor], want_hidden: bool, finish: Finish = unchanged
    ) -> list[Shard]:
        return [finish(self._run_micro_batch(m, k, want_hidden)) for m, k in zip(micro_batches, keep, strict=True)]

    # Not inference_mode: PyTorch's DTensor, which context_parallel is made of, resizes and views in place.
    @torch.no_grad()
    def _run_micro_batch(self, batch: Batch, keep: Tensor, want_hidden: bool) -> Shard:
        padding = (0, self.layout(batch.length).padded_length - batch.length)
        given = (to_device(pad(t, padding), self.device) for t in (batch.ids_BL, batch.position_ids_BL))
        positions_T = self.held_positions(batch.length, self.mesh["sp"].rank)
        at_k = torch.nonzero(torch.isin(positions_T, keep))[:, 0]
        self._calls = 0
        with (
            self.decoder.captured_hidden() as hidden,
            self.rope.of(batch.rope_lengths),
            self._shared(*given) as (ids_BT, position_ids_BT),
        ):
            out = self.model(
                input_ids=ids_BT,
                position_ids=position_ids_BT,
                use_cache=False,
                logits_to_keep=to_device(at_k, self.device),
            )
        if self._calls != len(self.layers):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} attended {self._calls} times through transformers' interface for "
                f"{len(self.layers)} layers, so {self.run_config.benchmark.implementation} cannot serve it"
            )
        return Shard(batch, positions_T, hidden[0] if want_hidden else None, positions_T[at_k], out.logits)
