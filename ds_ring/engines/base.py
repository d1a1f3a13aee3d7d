"""What every engine offers: the forward of a causal LM over many ranks, in transformers' terms.

Every rank is handed the same tokens and, from ``__call__``, gets the same full result. ``prefill`` is the layer below:
it leaves results where they were made, which is what a benchmark times.
"""

# Shapes: B rows, T columns of the caller's tensors, L packed tokens, l of them on this rank, k kept ones, V vocabulary.
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from ds_ring.attention.step import Step
from ds_ring.checks import ModelShape
from ds_ring.config import RunConfig
from ds_ring.engines import finite, scoring
from ds_ring.engines.batch import Batch, pack
from ds_ring.engines.decoding import Capture, Run
from ds_ring.engines.gather import assemble, gather_replicas, row_starts
from ds_ring.errors import InputError, NumericsError
from ds_ring.hardware import peak_memory_gib, synchronize
from ds_ring.hf.anatomy import Anatomy
from ds_ring.hf.attention import inject
from ds_ring.hf.context import AttentionContext
from ds_ring.hf.fused.fusion import Fusion
from ds_ring.layout import SequenceLayout
from ds_ring.shortage import explained
from ds_ring.stall import StallWatch, watched
from ds_ring.topology import Axis
from ds_ring.transport.choice import sharing_a_gpu
from ds_ring.transport.mesh import Mesh

if TYPE_CHECKING:
    from transformers import Cache, GenerationConfig
    from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

T = TypeVar("T")
NO_POSITIONS = torch.empty(0, dtype=torch.long)
ONE_TOKEN = SequenceLayout(1)


@dataclass(frozen=True)
class Shard:
    """One micro-batch's result on this rank.

    Attributes:
        batch: the micro-batch.
        positions_l: the packed positions of the tokens held here; those >= batch.length are padding. Empty on ranks
            that hold no result (earlier pipeline stages).
        hidden_Bld: final hidden states at ``positions_l``, where they were asked for.
        kept_k: the positions, among these, for which logits were made.
        logits_BkV: their logits.
    """

    batch: Batch
    positions_l: Tensor
    hidden_Bld: Tensor | None
    kept_k: Tensor
    logits_BkV: Tensor | None


class Engine(ABC):
    """A causal LM over all ranks of ``mesh``."""

    result_axis: Axis
    """The axis of a replica over which results are spread."""

    def __init__(
        self, model: PreTrainedModel, config: RunConfig, mesh: Mesh, shape: ModelShape, device: torch.device
    ) -> None:
        self.config, self.mesh, self.shape, self.device = config, mesh, shape, device
        self._context = AttentionContext(mesh, config.parallel, shape.num_heads, config.workload.block_rows)
        self._inject(model)
        self.anatomy = Anatomy.of(model)
        self.fusion: Fusion | None = None
        self.stall = StallWatch(mesh.traffic, config.ring.timeout_s)
        self.capture: Callable[[Run], Run | None] = lambda run: None
        """Gives what repeats a step of a generation, where that is not the step itself."""
        if self._captures:
            self.capture = Capture(self, insist=config.ring.decode_graph == "on")

    def _inject(self, model: PreTrainedModel) -> None:
        """Put the attention that shares sequences into ``model``."""
        inject(model, self._context)

    def _fuse(self, in_place: bool) -> None:
        """To be called once the model is as DeepSpeed serves it; ``in_place``: nobody else needs a layer's input."""
        if self.config.ring.fusion == "auto":
            self.fusion = Fusion(self.anatomy, self.config.workload.block_rows, in_place)

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model, or this rank's part of it."""
        return self.anatomy.model

    @property
    @abstractmethod
    def layers(self) -> range:
        """The numbers of the model's layers that this rank runs."""

    @abstractmethod
    def forward(self, micro_batches: list[Batch], keep: list[Tensor], want_hidden: bool) -> list[Shard]:
        """Run this replica's micro-batches; ``keep`` lists for each, ascending, the positions that need logits."""

    @abstractmethod
    def forward_last(self, micro_batches: list[Batch]) -> list[Tensor | None]:
        """Logits [B, V] of each row's last token, where they are made, with the last layer run for those alone."""

    @abstractmethod
    def held_positions(self, length: int, peer: int) -> Tensor:
        """Positions, in order, of the tokens whose results rank ``peer`` of ``result_axis`` holds."""

    @property
    def lanes(self) -> int:
        """How many micro-batches may be in flight."""
        return 1

    def _in_flight(self, micro_batches: list[Batch]) -> bool:
        """Whether these may be: there are several, and none needs what another leaves."""
        return self.lanes > 1 and len(micro_batches) > 1 and not any(m.in_order for m in micro_batches)

    @property
    def _captures(self) -> bool:
        topology, wanted = self.mesh.topology, self.config.ring.decode_graph
        # NCCL's calls can be captured; AutoTP's and a pipeline's have not been tried on GPUs.
        fit = topology.tp * topology.pp == 1 and not sharing_a_gpu()
        return self.device.type == "cuda" and (wanted == "on" or (wanted == "auto" and fit))

    @property
    def decodes_sliced(self) -> bool:
        """Whether ``decode`` gives each rank of ``sp`` a share of the heads."""
        return False

    @abstractmethod
    def slots(self, length: int) -> int:
        """Slots of a cache that ``length`` tokens take on every rank of a replica that shares a sequence."""

    @abstractmethod
    def tokens_held(self, length: int, tokens: int) -> Sequence[int]:
        """How many of them get a token, on each of those ranks, in a row that has ``tokens``: the first ones."""

    @abstractmethod
    def decode(self, ids_B1: Tensor, position_ids_B1: Tensor, step: Step) -> Tensor:
        """One token more in each row of this replica; their logits [B, V], the same on every rank of the replica."""

    @abstractmethod
    def mute(self, muted: bool) -> None:
        """Leave out all communication inside layers; results are then meaningless, their time is not."""

    @watched
    @explained
    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutput:
        """The model's logits, on every rank.

        Args:
            input_ids: [B, T], the same on every rank.
            attention_mask: [B, T], 1 for tokens and 0 for padding, on either side.
            position_ids: [B, T]; None: every row counts its own tokens from 0.
            logits_to_keep: only the last so many columns; 0 for all.

        Returns:
            CausalLMOutput with logits [B, T or logits_to_keep, V] in the model's dtype; 0 at padding.

        Raises:
            InputError: unusable tensors (see ``pack``). DisagreementError: ranks were given different tokens.
            NumericsError: a layer gave NaN or infinity.
        """
        batch, columns_BL = self.prepare(input_ids, attention_mask, position_ids)
        first = 0 if logits_to_keep == 0 else max(0, input_ids.shape[1] - logits_to_keep)
        micro_batches, mine = self._micro_batches(batch)
        wanted_BL = columns_BL >= first
        keep = [torch.nonzero(wanted_BL[_rows(m), : m.length].any(0))[:, 0] for m in micro_batches]
        shards = self.checked_forward(micro_batches, keep, want_hidden=False)
        logits_BTV: Tensor | None = None
        for shard, kept_k, micro_batch in zip(shards, keep, micro_batches, strict=True):
            part_BkV = self.assemble(shard.logits_BkV, micro_batch, kept_k, (self.shape.vocab_size,))
            if logits_BTV is None:
                logits_BTV = part_BkV.new_zeros(len(mine), input_ids.shape[1] - first, self.shape.vocab_size)
            columns_Bk = columns_BL[_rows(micro_batch)][:, kept_k].to(self.device)
            row, k = torch.nonzero(columns_Bk >= first, as_tuple=True)
            own_row = row + (micro_batch.rows.start - mine.start)
            logits_BTV[own_row, columns_Bk[row, k] - first] = part_BkV[row, k]
        assert logits_BTV is not None
        return CausalLMOutput(logits=gather_replicas(logits_BTV, len(batch.rows), self.mesh["dp"]))

    @watched
    @explained
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        generation_config: GenerationConfig | None = None,
        past_key_values: Cache | None = None,
        streamer: BaseStreamer | None = None,
        progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """transformers' own ``generate``, greedy or sampling, with the cache spread over the ranks.

        Every rank calls it with the same arguments and gets the same result. Sampling draws from rank 0's generator.

        Args:
            input_ids: [B, T], rows padded on the left; with ``past_key_values`` the whole conversation, as in
                transformers, or its new part under a mask of the whole.
            attention_mask: 1 for tokens and 0 for padding.
            past_key_values: what an earlier call of this engine gave with ``return_dict_in_generate=True``.
            streamer: is told the tokens on rank 0.
            progress: is told on rank 0, after each chunk of the prompts, how many of its replica's tokens its layers
                have run, and of how many.
            options: transformers' arguments of ``generate``.

        Raises:
            InputError: unusable tokens or options, before any work. DisagreementError: ranks were given different ones.
            NumericsError: a layer gave NaN or infinity.
        """
        from ds_ring.engines.generation import generate

        return generate(
            self, input_ids, attention_mask, generation_config, past_key_values, streamer, progress, options
        )

    @watched
    @explained
    def token_log_likelihoods(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Tensor]:
        """Log-likelihood in nats of every token of a row given those before it, from the row's second token on.

        Logits exist for a few tokens at a time and only where their hidden states are.

        Returns:
            On every rank, for each row an fp32 tensor of its number of tokens less one.

        Raises:
            InputError, DisagreementError, NumericsError: as ``__call__``.
        """
        batch, _ = self.prepare(input_ids, attention_mask, None)
        micro_batches, mine = self._micro_batches(batch)
        scores_BL = torch.zeros(len(mine), batch.length, device=self.device)
        nothing = [NO_POSITIONS for _ in micro_batches]
        for shard in self.checked_forward(micro_batches, nothing, want_hidden=True):
            local_Bl = None
            if shard.hidden_Bld is not None:
                local_Bl = scoring.next_token_log_likelihoods(
                    self.anatomy, shard.batch, shard.positions_l, shard.hidden_Bld
                )[:, shard.positions_l < shard.batch.length]
            length, start = shard.batch.length, shard.batch.rows.start - mine.start
            whole_BL = self.assemble(local_Bl, shard.batch, torch.arange(length), ())
            scores_BL[start : start + len(shard.batch.rows), :length] = whole_BL
        scores_BL = gather_replicas(scores_BL, len(batch.rows), self.mesh["dp"])
        return [scores[: n - 1].cpu() for scores, n in zip(scores_BL, batch.lengths, strict=True)]

    @watched
    @explained
    def prefill(self, batch: Batch, logits: Literal["none", "last", "all"], want_hidden: bool = False) -> list[Shard]:
        """One forward of this replica's rows; results stay where they are made.

        ``logits``: for no token, for each row's last, or for all.
        """
        micro_batches, _ = self._micro_batches(batch)
        keep = {
            "none": [NO_POSITIONS for _ in micro_batches],
            "last": [torch.tensor(sorted({n - 1 for n in m.lengths})) for m in micro_batches],
            "all": [torch.arange(m.length) for m in micro_batches],
        }
        return self.forward(micro_batches, keep[logits], want_hidden)

    @watched
    @explained
    def prefill_only(self, batch: Batch) -> list[Tensor | None]:
        """One forward of this replica's rows for the keys and values of all tokens and the logits that follow each row.

        The last layer makes keys and values for all tokens, and everything else for each row's last token only.
        Results, [B, V] a micro-batch, stay where they are made: on all ranks that share a sequence, and on the last
        pipeline stage.
        """
        micro_batches, _ = self._micro_batches(batch)
        return self.forward_last(micro_batches)

    @watched
    @explained
    def next_token_logits(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Logits [B, V] of the token after each row, on every rank, by ``prefill_only``.

        Arguments and errors as ``__call__``.
        """
        batch, _ = self.prepare(input_ids, attention_mask, position_ids)
        micro_batches, mine = self._micro_batches(batch)

        def run() -> list[Tensor | None]:
            return self.forward_last(micro_batches)

        parts = self._checked(run, lambda part: finite.all_finite(part))
        whole_BV: Tensor | None = None
        if parts[0] is not None:
            whole_BV = torch.cat([part for part in parts if part is not None])
        else:
            dtype = next(p.dtype for p in self.model.parameters())
            whole_BV = torch.zeros(len(mine), self.shape.vocab_size, dtype=dtype, device=self.device)
        stages = self.mesh["pp"]
        if stages.size > 1:
            whole_BV = stages.all_gather(whole_BV)[-1]
        return gather_replicas(whole_BV, len(batch.rows), self.mesh["dp"])

    @property
    def peak_memory_gib(self) -> float:
        """The most this rank has held, what peers can read included."""
        # Shared memory only grows, so that what it is now is its peak; on a CPU it is among the process's own.
        shared = self.mesh.shared_bytes if self.device.type == "cuda" else 0
        return peak_memory_gib(self.device) + shared / 2**30

    def settle(self) -> None:
        """Wait until everything queued on this rank's device has run."""
        with self.stall.over("waiting for the device"):
            synchronize(self.device)

    @watched
    def meet(self) -> None:
        """Wait until all ranks are here."""
        self.mesh["world"].barrier()

    @watched
    def gather(self, value: T) -> list[T]:
        """Every rank's small Python value, in rank order."""
        return self.mesh["world"].all_gather_objects(value)

    def prepare(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> tuple[Batch, Tensor]:
        """Check and pack the caller's tensors; all ranks must have been given the same."""
        try:
            batch, columns_BL = pack(input_ids.cpu(), attention_mask, position_ids, self.shape)
        except InputError as error:
            # Where only some ranks refuse, the others must hear of it rather than wait for them.
            self.mesh["world"].agree(input_ids=f"unusable ones: {error}")
            raise
        self.mesh["world"].agree(input_ids=batch.digest())
        return batch, columns_BL

    def own_rows(self, batch: Batch) -> range:
        """The rows of this replica."""
        return self.rows_of(len(batch.rows))

    def rows_of(self, count: int) -> range:
        """The rows of this replica, of ``count``."""
        replicas = self.mesh.topology.dp
        if count < replicas:
            raise InputError(
                f"a batch of {count} rows leaves some of dp_size={replicas} replicas without a sequence; "
                f"give at least {replicas} rows or lower dp_size"
            )
        starts = row_starts(count, replicas)
        index = self.mesh.coordinate("dp")
        return range(starts[index], starts[index + 1])

    def _micro_batches(self, batch: Batch) -> tuple[list[Batch], range]:
        mine = self.own_rows(batch)
        return batch.split(mine).micro_batches(self.config.workload.micro_batch_size), mine

    def checked_forward(self, micro_batches: list[Batch], keep: list[Tensor], want_hidden: bool) -> list[Shard]:
        """``forward``, refusing results that are not finite."""
        return self._checked(
            lambda: self.forward(micro_batches, keep, want_hidden),
            lambda shard: finite.all_finite(shard.logits_BkV, shard.hidden_Bld),
        )

    def _checked(self, run: Callable[[], list[T]], fine: Callable[[T], bool]) -> list[T]:
        """``run``, refusing results that are not finite; all ranks raise together and name where it began."""
        results = run()
        if all(self.mesh["world"].all_gather_objects(all(map(fine, results)))):
            return results
        raise self.traced(run)

    def traced(self, run: Callable[[], object]) -> NumericsError:
        """What to raise where ``run`` gave NaN or infinity: every rank runs it once more, to name where it began."""
        with finite.bad_layers(self.anatomy) as found:
            run()
        own = self.layers[min(found)] if found else None
        return NumericsError(finite.describe(self.mesh["world"].all_gather_objects(own), self.shape.num_layers))

    def assemble(self, local: Tensor | None, batch: Batch, kept_k: Tensor, trailing: tuple[int, ...]) -> Tensor:
        """[B, k, *trailing] on every rank of the replica; ``local`` is None where nothing is held."""
        transport = self.mesh[self.result_axis]
        if local is None:
            dtype = next(p.dtype for p in self.model.parameters()) if trailing else torch.float32
            local = torch.zeros(len(batch.rows), 0, *trailing, dtype=dtype, device=self.device)
        held = [self.held_positions(batch.length, peer) for peer in range(transport.size)]
        return assemble(local, held, kept_k, transport)


def _rows(batch: Batch) -> slice:
    return slice(batch.rows.start, batch.rows.stop)
