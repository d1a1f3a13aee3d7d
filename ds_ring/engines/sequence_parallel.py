"""The proposed method: weights whole on every rank, the sequence cut over ring x Ulysses. Alone (degree 1), this is
also one replica of data parallelism."""

# Shapes: B rows, L tokens of the batch, P padded to the layout, l tokens on this rank.
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ds_ring.checks import ModelShape
from ds_ring.config import RunConfig
from ds_ring.engines.base import Engine, Shard
from ds_ring.engines.batch import Batch
from ds_ring.engines.deepspeed import serve
from ds_ring.hf.anatomy import Anatomy
from ds_ring.hf.attention import AttentionContext, inject
from ds_ring.layout import SequenceLayout
from ds_ring.transport.mesh import Mesh


class SequenceParallelEngine(Engine):
    """``model`` must be whole; it is served through ``deepspeed.init_inference`` with our attention injected."""

    result_axis = "sp"

    def __init__(
        self, model: PreTrainedModel, config: RunConfig, mesh: Mesh, shape: ModelShape, device: torch.device
    ) -> None:
        super().__init__(config, mesh, shape, device)
        self._context = AttentionContext(mesh, config.parallel, shape.num_heads)
        inject(model, self._context)
        self._deepspeed = serve(model, config)
        self._anatomy = Anatomy.of(model)

    @property
    def model(self) -> PreTrainedModel:
        return self._anatomy.model

    def layout(self, length: int) -> SequenceLayout:
        p = self.config.parallel
        return SequenceLayout(length, p.ring_degree, p.ulysses_degree, p.ring_impl)

    def held_positions(self, length: int, peer: int) -> Sequence[int]:
        return self.layout(length).positions(*divmod(peer, self.config.parallel.ulysses_degree))

    def forward(self, micro_batches: list[Batch], keep: list[list[int]], want_hidden: bool) -> list[Shard]:
        return [self._forward(m, k, want_hidden) for m, k in zip(micro_batches, keep, strict=True)]

    def mute(self, muted: bool) -> None:
        for axis in ("ring", "ulysses"):
            self.mesh[axis].muted = muted

    @torch.inference_mode()
    def _forward(self, batch: Batch, keep: list[int], want_hidden: bool) -> Shard:
        layout = self.layout(batch.length)
        positions = layout.positions(self.mesh.coordinate("ring"), self.mesh.coordinate("ulysses"))
        padding = (0, layout.padded_length - batch.length)
        ids_Bl, position_ids_Bl = (
            pad(t, padding)[:, positions].to(self.device) for t in (batch.ids_BL, batch.position_ids_BL)
        )
        wanted = set(keep)
        at = [i for i, p in enumerate(positions) if p in wanted]
        expected = len(self._anatomy.layers)
        with (
            self._context.forward(layout, expected, type(self.model).__name__),
            self._anatomy.captured_hidden() as hidden,
        ):
            out = self._deepspeed(
                input_ids=ids_Bl,
                position_ids=position_ids_Bl,
                use_cache=False,
                logits_to_keep=torch.tensor(at, dtype=torch.long, device=self.device),
            )
        kept = [positions[i] for i in at]
        return Shard(batch, positions, hidden[0] if want_hidden else None, kept, out.logits)
