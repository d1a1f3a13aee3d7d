"""The proposed method: whole weights on every rank, the sequence cut over ring x Ulysses. With degree 1 it is also one
replica of data parallelism."""

# Shapes: B sequences, L tokens of the batch, P padded to the layout, T tokens on this rank.
from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import lru_cache, partial
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ds_ring.config import RunConfig
from ds_ring.engine.batch import Batch
from ds_ring.engine.batch_overlap import Lockstep, run_interleaved
from ds_ring.engine.decode_tp import decode_slices
from ds_ring.engine.deepspeed_backend import serve
from ds_ring.engine.model_runner import ONE_TOKEN, CachedRunner, Finish, Shard, unchanged
from ds_ring.engine.shared_weights import shared_weights
from ds_ring.hf.last_layer import LastTokens, last_tokens_only
from ds_ring.hf.rope import Lengths
from ds_ring.hf.tensor_slices import in_slices
from ds_ring.kv_cache.step import Step
from ds_ring.model_dims import ModelDims
from ds_ring.parallel.layout import SequenceLayout
from ds_ring.parallel.topology import Axis
from ds_ring.transport.mesh import Mesh
from ds_ring.utils.device import to_device

SHARING_AXES: tuple[Axis, ...] = ("ring", "ulysses")


class SequenceParallelRunner(CachedRunner):
    """``model`` must be whole; it is served through ``deepspeed.init_inference`` with our attention injected.

    Attributes:
        weights: what ranks hold of the weights between them; None: each holds all.
        slices: this rank's shares of the weights, for steps of a generation; None: it computes with whole weights.
    """

    result_axis = "sp"

    def __init__(
        self,
        model: PreTrainedModel,
        run_config: RunConfig,
        mesh: Mesh,
        dims: ModelDims,
        device: torch.device,
        fill: Callable[[int], None] = lambda number: None,
    ) -> None:
        """
        Args:
            fill: gives a layer its weights, where those of the model's layers are on the meta device.
        """
        super().__init__(model, run_config, mesh, dims, device)
        self.weights = shared_weights(model, run_config, mesh, device, fill)
        self._deepspeed = serve(model, run_config)
        self.slices = decode_slices(self.model, run_config, dims, mesh["sp"], device, self.weights)
        if self.weights is not None and self.slices is None:
            self.capture = lambda run: None  # a step fetches layers, which is not captured
        self._before_layers: list[RemovableHandle] = []
        self._fuse(in_place=True)

    @property
    def shared_bytes(self) -> int:
        return super().shared_bytes + (0 if self.weights is None else self.weights.parts.shared_bytes)

    @property
    def weight_bytes(self) -> int:
        return super().weight_bytes if self.weights is None else self.weights.nbytes

    def layout(self, length: int) -> SequenceLayout:
        p = self.run_config.parallel
        return SequenceLayout(length, p.ring_degree, p.ulysses_degree, p.ring_impl)

    @property
    def layers(self) -> range:
        return range(self.dims.num_layers)

    def held_positions(self, length: int, rank: int) -> Tensor:
        return positions_of(self.layout(length), *divmod(rank, self.run_config.parallel.ulysses_degree))

    @property
    def decodes_sliced(self) -> bool:
        return self.slices is not None

    def slots(self, length: int) -> int:
        return self.layout(length).local_length

    def tokens_held(self, length: int, tokens: int) -> list[int]:
        return [int((self.held_positions(length, rank) < tokens).sum()) for rank in range(self.mesh["sp"].size)]

    def run_micro_batches(
        self, micro_batches: list[Batch], keep: list[Tensor], want_hidden: bool, finish: Finish = unchanged
    ) -> list[Shard]:
        jobs = [
            partial(self._run_micro_batch, m, k, want_hidden, finish) for m, k in zip(micro_batches, keep, strict=True)
        ]
        interleaved = self._in_flight(micro_batches)
        with ExitStack() as stack:
            if self.weights is not None:
                lanes, wants_logits = self.lanes if interleaved else 1, any(len(k) for k in keep)
                stack.enter_context(self.weights.passes(len(jobs), lanes, wants_logits))
                if finish is not unchanged:  # which calls the head as often as a rank's own tokens want it
                    stack.enter_context(self.weights.whole_head())
            if not interleaved:
                return [job() for job in jobs]
            return run_interleaved(jobs, self._on_yield, self.lanes)

    @property
    def lanes(self) -> int:
        """One beside NCCL, whose kernels take SMs: there more micro-batches in flight cost more than they hide."""
        ring = self.run_config.ring
        wanted = self.mesh.overlaps if ring.interleave == "auto" else ring.interleave == "on"
        return ring.in_flight if wanted and self.mesh.topology.sp > 1 else 1

    def _on_yield(self, yield_lane: Callable[[], None] | None) -> None:
        """Two lanes alternate: transfers of one run during a layer of the other. More lanes go in lockstep."""
        lockstep = Lockstep(yield_lane) if yield_lane is not None and self.lanes > 2 else None
        for axis in SHARING_AXES:
            self.mesh[axis].beforehand = lockstep.before_transfer if lockstep else None
            self.mesh[axis].meanwhile = yield_lane
        for hook in self._before_layers:
            hook.remove()
        self._before_layers.clear()
        if self.weights is not None:
            self.weights.staging.yield_lane = yield_lane
        if lockstep is not None:
            self._before_layers += lockstep.hook(self.decoder.layers)

    def run_for_last_tokens(self, micro_batches: list[Batch]) -> list[Tensor | None]:
        with nullcontext() if self.weights is None else self.weights.passes(len(micro_batches)):
            return [self._run_for_last_tokens(m) for m in micro_batches]

    @torch.inference_mode()
    def _run_micro_batch(self, batch: Batch, keep: Tensor, want_hidden: bool, finish: Finish) -> Shard:
        positions_T = self.held_positions(batch.length, self.mesh["sp"].rank)
        at = torch.nonzero(torch.isin(positions_T, keep))[:, 0]
        with self.decoder.captured_hidden() as hidden:
            logits_BkV = self._call_model(batch, positions_T, at)
        return finish(Shard(batch, positions_T, hidden[0] if want_hidden else None, positions_T[at], logits_BkV))

    @torch.inference_mode()
    def _run_for_last_tokens(self, batch: Batch) -> Tensor:
        sp = self.mesh["sp"]
        tokens = LastTokens(batch.lengths, _positions_of_all(self.layout(batch.length)), sp)
        with last_tokens_only(self.decoder, self._context, tokens):
            positions_T = self.held_positions(batch.length, sp.rank)
            return self._call_model(batch, positions_T, torch.zeros(1, dtype=torch.long))[:, 0]

    def _call_model(self, batch: Batch, positions_T: Tensor, at_k: Tensor) -> Tensor:
        """The model on this rank's tokens; logits [B, k, V] of those with the indices ``at_k``."""
        layout = self.layout(batch.length)
        ids_BT, position_ids_BT = (self._own(t, layout) for t in (batch.ids_BL, batch.position_ids_BL))
        step = batch.step(positions_T, self.device)
        with (
            self._context.forward(layout, len(self.decoder.layers), type(self.model).__name__, step),
            self.rope.of(batch.rope_lengths),
        ):
            out = self._deepspeed(
                input_ids=ids_BT,
                position_ids=position_ids_BT,
                use_cache=False,
                logits_to_keep=to_device(at_k, self.device),
            )
        logits_BkV: Tensor = out.logits
        return logits_BkV

    def _own(self, tokens_BL: Tensor, layout: SequenceLayout) -> Tensor:
        """This rank's tokens, [B, T]. They are taken on the device: on the host, waking threads for it delays the first
        kernel of a pass by tens of milliseconds where ranks have more threads than cores."""
        tokens_BP = pad(to_device(tokens_BL, self.device), (0, layout.padded_length - tokens_BL.shape[1]))
        if layout.local_length == layout.padded_length:
            return tokens_BP
        ring_and_ulysses = divmod(self.mesh["sp"].rank, layout.ulysses_degree)
        return tokens_BP.index_select(1, _positions_on(self.device, layout, *ring_and_ulysses))

    @torch.inference_mode()
    def decode(self, ids_B1: Tensor, position_ids_B1: Tensor, step: Step, lengths: Lengths) -> Tensor:
        with (
            self._context.forward(ONE_TOKEN, len(self.decoder.layers), type(self.model).__name__, step),
            self.rope.of(lengths),
            nullcontext() if self.slices is None else in_slices(self.decoder, self.slices),
            nullcontext() if self.weights is None else self.weights.same_tokens(sliced=self.slices is not None),
        ):
            out = self._deepspeed(input_ids=ids_B1, position_ids=position_ids_B1, use_cache=False, logits_to_keep=1)
        # Every rank computed them, but libraries may differ in the last bit, and tokens must not.
        return self.mesh["sp"].broadcast(out.logits[:, -1], 0)


@lru_cache(maxsize=64)
def positions_of(layout: SequenceLayout, ring_rank: int, ulysses_rank: int) -> Tensor:
    """``SequenceLayout.positions`` as a tensor."""
    return torch.tensor(layout.positions(ring_rank, ulysses_rank))


@lru_cache(maxsize=4)
def _positions_on(device: torch.device, layout: SequenceLayout, ring_rank: int, ulysses_rank: int) -> Tensor:
    return to_device(positions_of(layout, ring_rank, ulysses_rank), device)


@lru_cache(maxsize=4)
def _positions_of_all(layout: SequenceLayout) -> list[list[int]]:
    """Positions on all ranks that share a sequence, in the order of the axis ``sp``."""
    ranks = product(range(layout.ring_degree), range(layout.ulysses_degree))
    return [list(layout.positions(*rank)) for rank in ranks]
