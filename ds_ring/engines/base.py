"""What every engine offers: the forward of a causal LM over many ranks, in transformers' terms.

Every rank is handed the same tokens and, from ``__call__``, gets the same full result. ``run`` is the layer below:
it leaves results where they were made, which is what a benchmark times.
"""

# Shapes: B rows, T columns of the caller's tensors, L packed tokens, l tokens on this rank, V vocabulary, d hidden.
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from ds_ring.checks import ModelShape
from ds_ring.config import RunConfig
from ds_ring.engines.batch import Batch, pack
from ds_ring.errors import DsRingError, InputError
from ds_ring.hf.anatomy import Anatomy, head_logits
from ds_ring.topology import Axis
from ds_ring.transport.mesh import Mesh

SCORE_CHUNK = 1024
"""Tokens whose logits exist at a time while scoring."""


@dataclass(frozen=True)
class Shard:
    """One micro-batch's result on this rank.

    Attributes:
        batch: the micro-batch.
        positions: the packed positions of the tokens held here; those >= batch.length are padding. Empty on ranks
            that hold no result (earlier pipeline stages).
        hidden_BlD: final hidden states at ``positions``, where they were asked for.
        kept: the positions for which logits were made here.
        logits_BkV: their logits.
    """

    batch: Batch
    positions: Sequence[int]
    hidden_BlD: Tensor | None
    kept: Sequence[int]
    logits_BkV: Tensor | None


class Engine(ABC):
    """A causal LM over all ranks of ``mesh``."""

    result_axis: Axis
    """The axis of a replica over which results are spread."""

    def __init__(self, config: RunConfig, mesh: Mesh, shape: ModelShape, device: torch.device) -> None:
        self.config, self.mesh, self.shape, self.device = config, mesh, shape, device

    @property
    @abstractmethod
    def model(self) -> PreTrainedModel:
        """The transformers model, or this rank's part of it."""

    @abstractmethod
    def forward(self, micro_batches: list[Batch], keep: list[list[int]], want_hidden: bool) -> list[Shard]:
        """Run this replica's micro-batches; ``keep`` lists for each the packed positions that need logits."""

    @abstractmethod
    def held_positions(self, length: int, peer: int) -> Sequence[int]:
        """Positions, in order, of the tokens whose results rank ``peer`` of ``result_axis`` holds."""

    @abstractmethod
    def mute(self, muted: bool) -> None:
        """Leave out all communication inside layers; results are then meaningless, their time is not."""

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
            InputError: unusable tensors (see ``pack``). TransportError: ranks were given different tokens.
        """
        batch, columns_BL = self.prepare(input_ids, attention_mask, position_ids)
        first = 0 if logits_to_keep == 0 else max(0, input_ids.shape[1] - logits_to_keep)
        wanted_BL = columns_BL >= first
        mine = self.own_rows(batch)
        micro_batches = batch.split(mine).micro_batches(self.config.workload.micro_batch_size)
        keep = [_columns_with_any(wanted_BL[m.rows.start : m.rows.stop, : m.length]) for m in micro_batches]
        logits_BTV: Tensor | None = None
        for shard, kept in zip(self.forward(micro_batches, keep, want_hidden=False), keep, strict=True):
            logits_BkV = self._assemble(shard.logits_BkV, shard.batch, kept, (self.shape.vocab_size,))
            if logits_BTV is None:
                logits_BTV = logits_BkV.new_zeros(len(mine), input_ids.shape[1] - first, self.shape.vocab_size)
            rows = range(shard.batch.rows.start - mine.start, shard.batch.rows.stop - mine.start)
            columns_Bk = columns_BL[shard.batch.rows.start : shard.batch.rows.stop][:, kept].to(self.device)
            row, k = torch.nonzero(columns_Bk >= first, as_tuple=True)
            logits_BTV[row + rows.start, columns_Bk[row, k] - first] = logits_BkV[row, k]
        assert logits_BTV is not None
        return CausalLMOutput(logits=self._gather_replicas(logits_BTV, len(batch.rows)))

    def token_log_likelihoods(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Tensor]:
        """Log-likelihood in nats of every token of a row given those before it, from the row's second token on.

        Logits exist for ``SCORE_CHUNK`` tokens at a time and only where their hidden states are.

        Returns:
            On every rank, for each row an fp32 tensor of its number of tokens less one.

        Raises:
            InputError, TransportError: as ``__call__``. DsRingError: the model gave NaN or infinity.
        """
        batch, _ = self.prepare(input_ids, attention_mask, None)
        mine = self.own_rows(batch)
        micro_batches = batch.split(mine).micro_batches(self.config.workload.micro_batch_size)
        scores_BL = torch.zeros(len(mine), batch.length, device=self.device)
        for shard in self.forward(micro_batches, [[] for _ in micro_batches], want_hidden=True):
            local_Bl = self._score(shard)
            length = shard.batch.length
            rows = slice(shard.batch.rows.start - mine.start, shard.batch.rows.stop - mine.start)
            scores_BL[rows, :length] = self._assemble(local_Bl, shard.batch, range(length), ())
        scores_BL = self._gather_replicas(scores_BL, len(batch.rows))
        if not bool(torch.isfinite(scores_BL).all()):
            row = int(torch.nonzero(~torch.isfinite(scores_BL))[0, 0])
            raise DsRingError(f"the model gave NaN or infinity for row {row}; try dtype fp32 or bf16")
        return [scores[: n - 1].cpu() for scores, n in zip(scores_BL, batch.lengths, strict=True)]

    def prefill(self, batch: Batch, logits: Literal["none", "last", "all"], want_hidden: bool = False) -> list[Shard]:
        """One forward of this replica's rows; results stay where they are made.

        ``logits``: for no token, for each row's last, or for all.
        """
        micro_batches = batch.split(self.own_rows(batch)).micro_batches(self.config.workload.micro_batch_size)
        if logits == "all":
            keep = [list(range(m.length)) for m in micro_batches]
        elif logits == "last":
            keep = [sorted({n - 1 for n in m.lengths}) for m in micro_batches]
        else:
            keep = [[] for _ in micro_batches]
        with torch.inference_mode():
            return self.forward(micro_batches, keep, want_hidden)

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
        """The rows of this replica; where they do not divide, earlier replicas take one more."""
        count, replicas = len(batch.rows), self.mesh.topology.dp
        if count < replicas:
            raise InputError(
                f"a batch of {count} rows leaves some of dp_size={replicas} replicas without a sequence; "
                f"give at least {replicas} rows or lower dp_size"
            )
        starts = _row_starts(count, replicas)
        index = self.mesh.coordinate("dp")
        return range(starts[index], starts[index + 1])

    def _score(self, shard: Shard) -> Tensor | None:
        """[B, l]: at each held position, the log-likelihood of the next token (0 where there is none)."""
        hidden_BlD = shard.hidden_BlD
        if hidden_BlD is None:
            return None
        following_BL = torch.nn.functional.pad(shard.batch.ids_BL, (0, 1))
        anatomy = Anatomy.of(self.model)
        at = torch.tensor(shard.positions).clamp(max=shard.batch.length - 1)
        targets_Bl = following_BL[:, at + 1].to(self.device)
        last_B = torch.tensor(shard.batch.lengths)[:, None] - 1
        scores = []
        with torch.inference_mode():
            for start in range(0, hidden_BlD.shape[1], SCORE_CHUNK):
                rows = slice(start, start + SCORE_CHUNK)
                logits_BkV = head_logits(anatomy, hidden_BlD[:, rows]).float()
                scores.append(log_softmax(logits_BkV, dim=-1).gather(2, targets_Bl[:, rows, None])[..., 0])
            inside_Bl = (torch.tensor(shard.positions)[None] < last_B).to(self.device)
            return torch.where(inside_Bl, torch.cat(scores, dim=1), 0.0)

    def _assemble(self, local: Tensor | None, batch: Batch, kept: Sequence[int], trailing: tuple[int, ...]) -> Tensor:
        """[B, len(kept), *trailing] on every rank of the replica, from what each holds of it in order."""
        transport = self.mesh[self.result_axis]
        wanted = {p: i for i, p in enumerate(kept)}
        shares = [
            [wanted[p] for p in self.held_positions(batch.length, peer) if p in wanted]
            for peer in range(transport.size)
        ]
        most = max(len(share) for share in shares)
        dtype = self._result_dtype if trailing else torch.float32
        buffer = torch.zeros(len(batch.rows), most, *trailing, dtype=dtype, device=self.device)
        if local is not None:
            if not trailing:
                held = self.held_positions(batch.length, transport.rank)
                local = local[:, [i for i, p in enumerate(held) if p in wanted]]
            buffer[:, : local.shape[1]] = local
        whole = buffer.new_zeros(len(batch.rows), len(kept), *trailing)
        for share, part in zip(shares, transport.all_gather(buffer), strict=True):
            whole[:, share] = part[:, : len(share)]
        return whole

    @property
    def _result_dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    def _gather_replicas(self, rows: Tensor, count: int) -> Tensor:
        """All rows of the batch, from each replica's own."""
        transport = self.mesh["dp"]
        if transport.size == 1:
            return rows
        starts = _row_starts(count, transport.size)
        buffer = rows.new_zeros(starts[1] - starts[0], *rows.shape[1:])
        buffer[: len(rows)] = rows
        parts = transport.all_gather(buffer)
        return torch.cat([part[: stop - start] for part, start, stop in zip(parts, starts, starts[1:], strict=False)])


def _row_starts(count: int, replicas: int) -> list[int]:
    base, extra = divmod(count, replicas)
    return [i * base + min(i, extra) for i in range(replicas + 1)]


def _columns_with_any(wanted_BL: Tensor) -> list[int]:
    found: list[int] = torch.nonzero(wanted_BL.any(0))[:, 0].tolist()
    return found
