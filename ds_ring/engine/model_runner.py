"""A layout: this rank's part of a causal LM over the ranks of a mesh.

``ModelRunner`` runs micro-batches and leaves results where they are made. ``CachedRunner`` also runs them against a
cache, which generation needs. ``engine.Engine`` makes whole results of either.
"""

# Shapes: B rows, L packed tokens, T of them on this rank, k kept ones, V vocabulary.
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ds_ring.config import RunConfig
from ds_ring.engine.batch import Batch
from ds_ring.engine.cuda_graph import Capture, DecodeStep
from ds_ring.engine.gather import assemble, sequence_starts
from ds_ring.engine.token_scores import LocalScores
from ds_ring.errors import InputError
from ds_ring.fusion.fuse import Fusion
from ds_ring.hf.attention import inject, torch_dtype
from ds_ring.hf.attention_context import AttentionContext
from ds_ring.hf.decoder import Decoder
from ds_ring.hf.rope import Lengths, RopeLengths
from ds_ring.kv_cache.step import Step
from ds_ring.model_dims import ModelDims
from ds_ring.parallel.layout import SequenceLayout
from ds_ring.parallel.topology import Axis
from ds_ring.process.watchdog import Watchdog
from ds_ring.transport.mesh import Mesh
from ds_ring.transport.select import sharing_a_gpu
from ds_ring.utils.device import peak_memory_gib

NO_POSITIONS = torch.empty(0, dtype=torch.long)
ONE_TOKEN = SequenceLayout(1)


@dataclass(frozen=True)
class Shard:
    """One micro-batch's result on this rank.

    Attributes:
        batch: the micro-batch.
        positions_T: the packed positions of the tokens held here; those >= batch.length are padding. Empty on ranks
            that hold no result (earlier pipeline stages).
        hidden_BTd: final hidden states at ``positions_T``, where they were asked for.
        kept_k: the positions, among these, for which logits were made.
        logits_BkV: their logits.
        scores: what a scorer made of the hidden states.
    """

    batch: Batch
    positions_T: Tensor
    hidden_BTd: Tensor | None
    kept_k: Tensor
    logits_BkV: Tensor | None
    scores: LocalScores | None = None


Finish = Callable[[Shard], Shard]
"""Is given each micro-batch's result where and as soon as it is made; what it returns is the result."""


def unchanged(shard: Shard) -> Shard:
    return shard


class ModelRunner(ABC):
    """This rank's part of a causal LM over all ranks of ``mesh``."""

    result_axis: Axis
    """The axis of a replica over which results are spread."""

    def __init__(
        self, model: PreTrainedModel, run_config: RunConfig, mesh: Mesh, dims: ModelDims, device: torch.device
    ) -> None:
        self.run_config, self.mesh, self.dims, self.device = run_config, mesh, dims, device
        self._inject(model)
        self.rope = RopeLengths(model)
        self.decoder = Decoder.of(model)
        self.fusion: Fusion | None = None
        self.watchdog = Watchdog(mesh.traffic, run_config.ring.timeout_s)

    @classmethod  # noqa: B027
    def check(cls, run_config: RunConfig, dims: ModelDims, device_type: str) -> None:
        """Refuse, before ranks connect, what this layout cannot do; beside ``planning.validation.check_layout``."""

    @abstractmethod
    def _inject(self, model: PreTrainedModel) -> None:
        """Put the attention that shares sequences into ``model``."""

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model, or this rank's part of it."""
        return self.decoder.model

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and hidden states."""
        return torch_dtype(self.run_config.dtype)

    @property
    @abstractmethod
    def layers(self) -> range:
        """The numbers of the model's layers that this rank runs."""

    @abstractmethod
    def run_micro_batches(
        self, micro_batches: list[Batch], keep: list[Tensor], want_hidden: bool, finish: Finish = unchanged
    ) -> list[Shard]:
        """Run this replica's micro-batches; ``keep`` lists for each, ascending, the positions that need logits."""

    @abstractmethod
    def held_positions(self, length: int, rank: int) -> Tensor:
        """Positions, in order, of the tokens whose results ``rank`` of ``result_axis`` holds."""

    @property
    def lanes(self) -> int:
        """How many micro-batches may be in flight."""
        return 1

    @property
    def shared_bytes(self) -> int:
        """Of this rank's memory, what peers can read."""
        return self.mesh.shared_bytes

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that this rank holds."""
        return sum(p.nbytes for p in self.model.parameters())

    @property
    def peak_memory_gib(self) -> float:
        """The most this rank has held, what peers can read included."""
        # Shared memory changes with the form of micro-batches alone: what it is now is the peak of the last ones. On a
        # CPU it is among the process's own.
        shared = self.shared_bytes if self.device.type == "cuda" else 0
        return peak_memory_gib(self.device) + shared / 2**30

    def sequences_of_replica(self, count: int) -> range:
        """The sequences of this replica, of ``count``.

        Raises:
            InputError: there are fewer sequences than replicas.
        """
        replicas = self.mesh.topology.dp
        if count < replicas:
            raise InputError(
                f"a batch of {count} rows leaves some of dp_size={replicas} replicas without a sequence; "
                f"give at least {replicas} rows or lower dp_size"
            )
        starts = sequence_starts(count, replicas)
        index = self.mesh.coordinate("dp")
        return range(starts[index], starts[index + 1])

    def micro_batches(self, batch: Batch) -> tuple[list[Batch], range]:
        """This replica's part of ``batch`` in micro-batches; which of its sequences they are."""
        mine = self.sequences_of_replica(len(batch.sequences))
        return batch.split(mine).micro_batches(self.run_config.workload.micro_batch_size), mine

    def assemble(self, local: Tensor | None, batch: Batch, kept_k: Tensor, trailing: tuple[int, ...]) -> Tensor:
        """[B, k, *trailing] on every rank of the replica; ``local`` is None where nothing is held."""
        transport = self.mesh[self.result_axis]
        if local is None:
            dtype = next(p.dtype for p in self.model.parameters()) if trailing else torch.float32
            local = torch.zeros(len(batch.sequences), 0, *trailing, dtype=dtype, device=self.device)
        held = [self.held_positions(batch.length, rank) for rank in range(transport.size)]
        return assemble(local, held, kept_k, transport)


class CachedRunner(ModelRunner):
    """A layout of ours: it can also keep keys and values, and shorten the last layer to what a next token needs."""

    def __init__(
        self, model: PreTrainedModel, run_config: RunConfig, mesh: Mesh, dims: ModelDims, device: torch.device
    ) -> None:
        self._context = AttentionContext(mesh, run_config.parallel, dims.num_heads, run_config.workload.block_tokens)
        super().__init__(model, run_config, mesh, dims, device)
        self.capture: Callable[[DecodeStep], DecodeStep | None] = lambda run: None
        """Gives what repeats a step of a generation, where that is not the step itself."""
        if self._captures:
            insist = run_config.ring.decode_graph == "on"
            self.capture = Capture(mesh.traffic, type(model).__name__, insist)

    def _inject(self, model: PreTrainedModel) -> None:
        inject(model, self._context)

    def _fuse(self, in_place: bool) -> None:
        """To be called once the model is as DeepSpeed serves it; ``in_place``: nobody else needs a layer's input."""
        if self.run_config.ring.fusion == "auto":
            self.fusion = Fusion(self.decoder, self.run_config.workload.block_tokens, in_place)

    def _in_flight(self, micro_batches: list[Batch]) -> bool:
        """Whether these may be: there are several, and none needs what another leaves."""
        return self.lanes > 1 and len(micro_batches) > 1 and not any(m.in_order for m in micro_batches)

    @property
    def _captures(self) -> bool:
        topology, wanted = self.mesh.topology, self.run_config.ring.decode_graph
        # NCCL's calls can be captured; AutoTP's and a pipeline's have not been tried on GPUs.
        fit = topology.tp * topology.pp == 1 and not sharing_a_gpu()
        return self.device.type == "cuda" and (wanted == "on" or (wanted == "auto" and fit))

    @property
    def decodes_sliced(self) -> bool:
        """Whether ``decode`` gives each rank of ``sp`` a share of the heads."""
        return False

    @abstractmethod
    def run_for_last_tokens(self, micro_batches: list[Batch]) -> list[Tensor | None]:
        """Logits [B, V] of each row's last token, where they are made, with the last layer run for those alone."""

    @abstractmethod
    def slots(self, length: int) -> int:
        """Slots of a cache that ``length`` tokens take on every rank of a replica that shares a sequence."""

    @abstractmethod
    def tokens_held(self, length: int, tokens: int) -> Sequence[int]:
        """How many of them get a token, on each of those ranks, in a row that has ``tokens``: the first ones."""

    @abstractmethod
    def decode(self, ids_B1: Tensor, position_ids_B1: Tensor, step: Step, lengths: Lengths) -> Tensor:
        """One token more in each sequence of this replica; their logits [B, V], the same on every rank of the replica.

        Args:
            lengths: gives the tokens of each sequence, this one included.
        """
