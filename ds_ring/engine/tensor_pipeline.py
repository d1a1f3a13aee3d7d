"""Tensor x pipeline parallelism, which the paper compares with. DeepSpeed's AutoTP shards the layers of each stage;
stages pass hidden states on while several micro-batches are in flight."""

# Shapes: B sequences of a micro-batch, L tokens, d hidden size.
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from deepspeed.module_inject.layers import TensorParallel_Layer
from torch import Tensor
from transformers import PreTrainedModel

from ds_ring.config import RunConfig
from ds_ring.engine.batch import Batch
from ds_ring.engine.batch_overlap import run_interleaved
from ds_ring.engine.deepspeed_backend import serve
from ds_ring.engine.model_runner import NO_POSITIONS, ONE_TOKEN, CachedRunner, Finish, Shard, unchanged
from ds_ring.engine.pipeline_comm import pipeline_comm
from ds_ring.hf.attention import torch_dtype
from ds_ring.hf.last_layer import LastTokens, last_tokens_only
from ds_ring.hf.linear import YIELD_LANE
from ds_ring.hf.rope import Lengths
from ds_ring.hf.stage import spliced
from ds_ring.kv_cache.step import Step
from ds_ring.model_dims import ModelDims
from ds_ring.parallel.degrees import stage_layers
from ds_ring.parallel.layout import SequenceLayout
from ds_ring.transport.mesh import Mesh
from ds_ring.utils.device import to_device


class TensorPipelineRunner(CachedRunner):
    """``model`` holds this stage's layers only (``hf.loading.load_stage``, ``hf.stage.keep_stage``)."""

    result_axis = "pp"

    def __init__(
        self, model: PreTrainedModel, run_config: RunConfig, mesh: Mesh, dims: ModelDims, device: torch.device
    ) -> None:
        super().__init__(model, run_config, mesh, dims, device)
        self.stage, self.stages = mesh.coordinate("pp"), mesh.topology.pp
        self._deepspeed = serve(model, run_config, tensor_parallel=mesh["tp"])
        self._fuse(in_place=False)  # hidden states may be on their way to the next stage

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1

    @property
    def layers(self) -> range:
        return stage_layers(self.dims.num_layers, self.stages, self.stage)

    def held_positions(self, length: int, rank: int) -> Tensor:
        return torch.arange(length) if rank == self.stages - 1 else NO_POSITIONS

    def slots(self, length: int) -> int:
        return length

    def tokens_held(self, length: int, tokens: int) -> tuple[int]:
        return (tokens,)

    @property
    def lanes(self) -> int:
        """Two where configured: the layers of one run during the all-reduces of the other."""
        wanted = self.run_config.ring.interleave == "on"
        return 2 if wanted and self.stages == 1 and self.fusion is not None else 1

    def _on_yield(self, yield_lane: Callable[[], None] | None) -> None:
        for module in self.model.modules():
            if isinstance(module, TensorParallel_Layer):
                setattr(module, YIELD_LANE, yield_lane)

    def run_micro_batches(
        self, micro_batches: list[Batch], keep: list[Tensor], want_hidden: bool, finish: Finish = unchanged
    ) -> list[Shard]:
        if self._in_flight(micro_batches):
            pairs = zip(micro_batches, keep, strict=True)
            jobs = [partial(self._pass, [m], [k], want_hidden, finish) for m, k in pairs]
            return [shard for (shard,) in run_interleaved(jobs, self._on_yield, self.lanes)]
        return self._pass(micro_batches, keep, want_hidden, finish)

    def _pass(self, micro_batches: list[Batch], keep: list[Tensor], want_hidden: bool, finish: Finish) -> list[Shard]:
        shards: list[Shard] = []

        def stage(number: int, hidden_in: Tensor | None) -> Tensor:
            batch, kept_k = micro_batches[number], keep[number] if self.is_last else NO_POSITIONS
            with self.decoder.captured_hidden() as final:
                hidden_out, logits_BkV = self._run_stage(batch, kept_k, hidden_in)
            if self.is_last:
                hidden_BLd = final[0] if want_hidden else None
                shard = Shard(batch, torch.arange(batch.length), hidden_BLd, kept_k, logits_BkV)
            else:
                shard = Shard(batch, NO_POSITIONS, None, NO_POSITIONS, None)
            shards.append(finish(shard))
            return hidden_out

        self._pipeline(micro_batches, stage)
        return shards

    def run_for_last_tokens(self, micro_batches: list[Batch]) -> list[Tensor | None]:
        found: list[Tensor | None] = []

        def stage(number: int, hidden_in: Tensor | None) -> Tensor:
            batch = micro_batches[number]
            if not self.is_last:
                found.append(None)
                return self._run_stage(batch, NO_POSITIONS, hidden_in)[0]
            tokens = LastTokens(batch.lengths, [list(range(batch.length))], self.mesh["sp"])
            with last_tokens_only(self.decoder, self._context, tokens):
                hidden_out, logits_B1V = self._run_stage(batch, torch.zeros(1, dtype=torch.long), hidden_in)
            found.append(logits_B1V[:, 0])
            return hidden_out

        self._pipeline(micro_batches, stage)
        return found

    @torch.inference_mode()
    def _pipeline(self, micro_batches: list[Batch], stage: Callable[[int, Tensor | None], Tensor]) -> None:
        """Stage s works on micro-batch m while stage s-1 works on m+1; the next input is already under way.

        Args:
            stage: (a micro-batch's number, its hidden states or None for its tokens) -> hidden states to pass on.
        """
        shapes = [(len(m.sequences), m.length, self.dims.hidden_size) for m in micro_batches]
        stages = pipeline_comm(self.mesh["pp"], shapes, torch_dtype(self.run_config.dtype), self.device)
        arriving = stages.post_receive(shapes[0])
        for number in range(len(micro_batches)):
            hidden_in, pending = arriving
            if number + 1 < len(micro_batches):
                arriving = stages.post_receive(shapes[number + 1])
            pending.wait()
            stages.send(stage(number, hidden_in))
        stages.finish()

    @torch.inference_mode()
    def decode(self, ids_B1: Tensor, position_ids_B1: Tensor, step: Step, lengths: Lengths) -> Tensor:
        pp, sequences = self.mesh["pp"], ids_B1.shape[0]
        dtype = torch_dtype(self.run_config.dtype)
        hidden_in: Tensor | None = None
        if self.stage > 0:
            hidden_in = torch.empty(sequences, 1, self.dims.hidden_size, dtype=dtype, device=self.device)
            pp.exchange([], [(self.stage - 1, hidden_in)]).wait()
        inputs = {"input_ids": ids_B1} if hidden_in is None else {"inputs_embeds": hidden_in}
        with (
            self._context.forward(ONE_TOKEN, len(self.decoder.layers), type(self.model).__name__, step),
            self.rope.of(lengths),
            spliced(self.decoder, hidden_in) as after_layers,
        ):
            out = self._deepspeed(**inputs, position_ids=position_ids_B1, use_cache=False, logits_to_keep=1)
        if self.is_last:
            logits_BV = self.mesh["tp"].broadcast(out.logits[:, -1], 0)
        else:
            pp.exchange([(self.stage + 1, after_layers[0].contiguous())], []).wait()
            logits_BV = torch.empty(sequences, self.dims.vocab_size, dtype=dtype, device=self.device)
        return pp.broadcast(logits_BV, self.stages - 1)

    def _run_stage(self, batch: Batch, kept_k: Tensor, hidden_in: Tensor | None) -> tuple[Tensor, Tensor]:
        """(hidden states after this stage's layers, logits [B, k, V] at ``kept_k``, which count on the last stage)."""
        if hidden_in is None:
            inputs = {"input_ids": to_device(batch.ids_BL, self.device)}
        else:
            inputs = {"inputs_embeds": hidden_in}
        layout, step = SequenceLayout(batch.length), batch.step(torch.arange(batch.length), self.device)
        with (
            self._context.forward(layout, len(self.decoder.layers), type(self.model).__name__, step),
            self.rope.of(batch.rope_lengths),
            spliced(self.decoder, hidden_in) as after_layers,
        ):
            out = self._deepspeed(
                **inputs,
                position_ids=to_device(batch.position_ids_BL, self.device),
                use_cache=False,
                logits_to_keep=to_device(kept_k, self.device),
            )
        return after_layers[0], out.logits
