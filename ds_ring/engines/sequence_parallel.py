"""The proposed method: weights whole on every rank, the sequence cut over ring x Ulysses. Alone (degree 1), this is
also one replica of data parallelism."""

# Shapes: B rows, L tokens of the batch, P padded to the layout, l tokens on this rank.
from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ds_ring.checks import ModelShape
from ds_ring.config import RunConfig
from ds_ring.engines.base import Engine, Shard
from ds_ring.engines.batch import Batch
from ds_ring.engines.deepspeed import serve
from ds_ring.engines.transfer import to_device
from ds_ring.layout import SequenceLayout
from ds_ring.transport.mesh import Mesh


class SequenceParallelEngine(Engine):
    """``model`` must be whole; it is served through ``deepspeed.init_inference`` with our attention injected."""

    result_axis = "sp"

    def __init__(
        self, model: PreTrainedModel, config: RunConfig, mesh: Mesh, shape: ModelShape, device: torch.device
    ) -> None:
        super().__init__(model, config, mesh, shape, device)
        self._deepspeed = serve(model, config)
        self._fuse()

    def layout(self, length: int) -> SequenceLayout:
        p = self.config.parallel
        return SequenceLayout(length, p.ring_degree, p.ulysses_degree, p.ring_impl)

    @property
    def layers(self) -> range:
        return range(self.shape.num_layers)

    def held_positions(self, length: int, peer: int) -> Tensor:
        return _positions(self.layout(length), *divmod(peer, self.config.parallel.ulysses_degree))

    def forward(self, micro_batches: list[Batch], keep: list[Tensor], want_hidden: bool) -> list[Shard]:
        return [self._forward(m, k, want_hidden) for m, k in zip(micro_batches, keep, strict=True)]

    def mute(self, muted: bool) -> None:
        for axis in ("ring", "ulysses"):
            self.mesh[axis].muted = muted

    @torch.inference_mode()
    def _forward(self, batch: Batch, keep: Tensor, want_hidden: bool) -> Shard:
        layout = self.layout(batch.length)
        positions_l = self.held_positions(batch.length, self.mesh["sp"].rank)
        padding = (0, layout.padded_length - batch.length)
        ids_Bl, position_ids_Bl = (
            to_device(pad(t, padding)[:, positions_l], self.device) for t in (batch.ids_BL, batch.position_ids_BL)
        )
        at = torch.nonzero(torch.isin(positions_l, keep))[:, 0]
        expected = len(self.anatomy.layers)
        with (
            self._context.forward(layout, expected, type(self.model).__name__),
            self.anatomy.captured_hidden() as hidden,
        ):
            out = self._deepspeed(
                input_ids=ids_Bl,
                position_ids=position_ids_Bl,
                use_cache=False,
                logits_to_keep=to_device(at, self.device),
            )
        return Shard(batch, positions_l, hidden[0] if want_hidden else None, positions_l[at], out.logits)


@lru_cache(maxsize=64)
def _positions(layout: SequenceLayout, ring_rank: int, ulysses_rank: int) -> Tensor:
    return torch.tensor(layout.positions(ring_rank, ulysses_rank))
