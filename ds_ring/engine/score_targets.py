"""What is to be scored: the caller's targets, checked and packed beside a batch of the sequences that have any."""

# Shapes: B sequences given, R of them run, C columns of the caller's tensors, L packed tokens, A targets of a token.
from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from ds_ring.engine.batch import Batch, pack
from ds_ring.engine.vocabulary_scan import Wanted
from ds_ring.errors import InputError
from ds_ring.model_dims import ModelDims
from ds_ring.utils.numbers import whole_number
from ds_ring.utils.unscored import UNSCORED


@dataclass(frozen=True)
class Targets:
    """Of a call of ``score``, all on the host.

    Attributes:
        batch: the sequences that have something to score; None where none has.
        ids_RLA: their targets, packed as ``batch``; -100 at what is not scored.
        positions: of each of the B sequences the tokens that are scored, ascending.
        flat: one target a token was given.
    """

    batch: Batch | None
    ids_RLA: Tensor
    positions: list[Tensor]
    flat: bool

    @cached_property
    def scored_RL(self) -> Tensor:
        return (self.ids_RLA != UNSCORED).any(2)

    def digest(self) -> str:
        """Equal on two ranks exactly when they are to score the same."""
        what = "nothing" if self.batch is None else self.batch.digest()
        digest = hashlib.sha256(self.ids_RLA.contiguous().numpy().tobytes()).hexdigest()[:12]
        return f"{what}, {int(self.scored_RL.sum())} of them scored, targets with digest {digest}"


def check_wanted(wanted: Wanted, start: int, dims: ModelDims) -> None:
    """Raise InputError for an option that cannot be."""
    if not 0 <= whole_number("top_k", wanted.top_k) <= dims.vocab_size:
        raise InputError(f"top_k={wanted.top_k} must be from 0 to the vocabulary's size, {dims.vocab_size}")
    if not isinstance(wanted.temperature, int | float) or not 0 < wanted.temperature < float("inf"):
        raise InputError(f"temperature={wanted.temperature!r} must be a number above 0")
    whole_number("start", start, least=0)


def targets_of(
    input_ids_BC: Tensor,
    attention_mask_BC: Tensor | None,
    target_ids: Tensor | None,
    start: int,
    replicas: int,
    dims: ModelDims,
) -> Targets:
    """Check the caller's tensors and keep the sequences that have something to score.

    Args:
        target_ids: [B, C] or [B, C, A]; None: of every token the next one.
        replicas: the batch gets at least so many sequences. Those without one of their own get a single token, of which
            nothing is scored.

    Raises:
        InputError: as of ``pack``; targets of another shape or outside the vocabulary; ``start`` beyond all sequences.
    """
    mask_BC = _mask(input_ids_BC, attention_mask_BC)
    longest = int(mask_BC.sum(1).max())
    if start > 0 and start >= longest:
        raise InputError(f"start={start} is beyond the longest sequence, which has {longest} tokens; lower it")
    at_BC = mask_BC.cumsum(1) - 1
    targets_BCA = _next_tokens(input_ids_BC, mask_BC) if target_ids is None else _given(target_ids, mask_BC, dims)
    targets_BCA = targets_BCA.masked_fill((~mask_BC | (at_BC < start))[..., None], UNSCORED)
    scored_BC = (targets_BCA != UNSCORED).any(2)
    positions = [at_C[scored_C] for at_C, scored_C in zip(at_BC, scored_BC, strict=True)]
    flat = target_ids is None or target_ids.dim() == 2
    run = torch.nonzero(scored_BC.any(1))[:, 0]
    if not len(run):
        return Targets(None, targets_BCA.new_empty(0, 0, targets_BCA.shape[2]), positions, flat)
    ids_RC, mask_RC, targets_RCA = input_ids_BC[run], mask_BC[run], targets_BCA[run]
    if (missing := replicas - len(run)) > 0:
        ids_RC, mask_RC = pad(ids_RC, (0, 0, 0, missing)), pad(mask_RC, (0, 0, 0, missing))
        mask_RC[-missing:, 0] = True
        targets_RCA = pad(targets_RCA, (0, 0, 0, 0, 0, missing), value=UNSCORED)
    batch, columns_RL = pack(ids_RC, mask_RC, None, dims)
    at_RLA = columns_RL.clamp(min=0)[..., None].expand(-1, -1, targets_RCA.shape[2])
    ids_RLA = targets_RCA.gather(1, at_RLA).masked_fill((columns_RL < 0)[..., None], UNSCORED)
    return Targets(batch, ids_RLA, positions, flat)


def _mask(input_ids_BC: Tensor, attention_mask_BC: Tensor | None) -> Tensor:
    if attention_mask_BC is None:
        return torch.ones_like(input_ids_BC, dtype=torch.bool)
    if attention_mask_BC.shape != input_ids_BC.shape:
        raise InputError(
            f"attention_mask has shape {tuple(attention_mask_BC.shape)}, input_ids {tuple(input_ids_BC.shape)}"
        )
    return attention_mask_BC.cpu() != 0


def _next_tokens(ids_BC: Tensor, mask_BC: Tensor) -> Tensor:
    """[B, C, 1]: of each token the id of the next one that is no padding, -100 where there is none."""
    next_BC1 = torch.full((*ids_BC.shape, 1), UNSCORED)
    for next_C, ids_C, mask_C in zip(next_BC1[..., 0], ids_BC, mask_BC, strict=True):
        columns = torch.nonzero(mask_C)[:, 0]
        next_C[columns[:-1]] = ids_C[columns[1:]].long()
    return next_BC1


def _given(target_ids: Tensor, mask_BC: Tensor, dims: ModelDims) -> Tensor:
    """[B, C, A] int64 on the host."""
    if target_ids.dim() not in (2, 3) or target_ids.shape[:2] != mask_BC.shape:
        raise InputError(
            f"target_ids must have the shape [batch, length] or [batch, length, candidates] for input_ids of shape "
            f"{tuple(mask_BC.shape)}, not {tuple(target_ids.shape)}"
        )
    if target_ids.dim() == 3 and target_ids.shape[2] == 0:
        raise InputError(f"target_ids of shape {tuple(target_ids.shape)} hold no candidate; None takes the next tokens")
    given_BCA = target_ids.cpu().long().view(*target_ids.shape[:2], -1)
    bad_BCA = (given_BCA != UNSCORED) & ((given_BCA < 0) | (given_BCA >= dims.vocab_size)) & mask_BC[..., None]
    if bad_BCA.any():
        sequence, column, _ = torch.nonzero(bad_BCA)[0].tolist()
        raise InputError(
            f"target_ids[{sequence}, {column}] is {int(given_BCA[bad_BCA][0])}, outside the vocabulary of "
            f"{dims.vocab_size}; {UNSCORED} leaves a token out"
        )
    return given_BCA
