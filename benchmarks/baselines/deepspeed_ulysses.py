"""DeepSpeed's own Ulysses for transformers' models, ``UlyssesSPAttentionHF``, as a baseline.

Its attention is used as it is. What its registration does around it is left out: that replaces "sdpa" for the whole
process, and reads a field of the config that not every model has.
"""

# Shapes: B rows, P padded tokens, T of them on this rank.
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.baselines.runner import BaselineRunner
from benchmarks.communication.journal import blanks
from benchmarks.replaced import replaced
from ds_ring.parallel.layout import SequenceLayout


class DeepSpeedUlyssesRunner(BaselineRunner):
    """Heads against tokens by ``deepspeed.comm``'s all-to-all; every rank holds neighbouring tokens."""

    _position_ids_BT: Tensor

    def layout(self, length: int) -> SequenceLayout:
        return SequenceLayout(length, ulysses_degree=self.run_config.parallel.ulysses_degree)

    @contextmanager
    def _shared(self, ids_BP: Tensor, position_ids_BP: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        rank, size = self.mesh["sp"].rank, self.mesh["sp"].size
        ids_BT, self._position_ids_BT = (t.chunk(size, dim=1)[rank].contiguous() for t in (ids_BP, position_ids_BP))
        self._attention = self._attention_for(len(ids_BT))
        all_to_all_single = partial(self._all_to_all, _all_to_all_single)
        with replaced(deepspeed.comm, all_to_all_single=all_to_all_single, all_gather=self._all_gather):
            yield ids_BT, self._position_ids_BT

    def _attention_for(self, rows: int) -> UlyssesSPAttentionHF:
        """It is made for one number of rows; it has no parameters, so a new one costs nothing."""
        return UlyssesSPAttentionHF(
            attn=sdpa_attention_forward,
            batch_size=rows,
            attn_head_count=self.dims.num_heads,
            attn_head_size=self.dims.head_dim,
            kv_head_count=self.dims.num_kv_heads,
            num_hidden_layers=self.dims.num_layers,
            process_group=self.mesh["sp"].group,  # type: ignore[attr-defined]
            seq_length_is_variable=True,
        )

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: Any
    ) -> tuple[Tensor, None]:
        # Not every model hands them on to its attention, and without them it refuses.
        options["position_ids"] = self._position_ids_BT
        return self._attention(module, query, key, value, mask, **options)

    def _all_gather(self, outputs: list[Tensor], tensor: Tensor, group: Any = None, **options: Any) -> Any:
        alike, count = blanks(tensor), len(outputs)

        def again() -> None:
            (sent,) = alike()
            _all_gather([torch.empty_like(sent) for _ in range(count)], sent, group=group)

        self._account("all_gather", tensor.nbytes * (count - 1), again)
        if not self.muted:
            return _all_gather(outputs, tensor, group=group, **options)
        for output in outputs:
            output.copy_(tensor)
        return None


_all_to_all_single, _all_gather = deepspeed.comm.all_to_all_single, deepspeed.comm.all_gather
