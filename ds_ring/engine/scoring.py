"""Scores of tokens, computed on the rank that holds their hidden states.

Each micro-batch is scored as its forward ends, and its hidden states are let go. The model's own code makes logits, for
so many tokens at a time that there are ``LOGIT_ELEMENTS`` of them, over the whole vocabulary: so ranks are exact, and
scaling, soft-capping and biases are the model's. ``vocabulary_scan`` looks at some columns of them at a time, in fp32.
"""

# Shapes: B sequences, L tokens of the batch, T of them on this rank, M scored, C targets, F words of a token, d hidden.
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from ds_ring.engine import nan_check
from ds_ring.engine.batch import Batch
from ds_ring.engine.gather import assemble_ragged, gather_ragged, sequence_starts
from ds_ring.engine.model_runner import NO_POSITIONS, ModelRunner, Shard
from ds_ring.engine.score_targets import Targets
from ds_ring.engine.token_scores import LocalScores, TokenScores, scores_of, width, words_of
from ds_ring.engine.vocabulary_scan import Wanted, scan
from ds_ring.hf.decoder import Decoder
from ds_ring.hf.head_shares import logits_of_share
from ds_ring.transport.base import Transport
from ds_ring.utils.device import to_device
from ds_ring.utils.unscored import UNSCORED

LOGIT_ELEMENTS = 1 << 26
"""Logits that exist at a time, in the model's dtype."""
TILE = 128
"""Tokens that a matrix product's kernel works on together: of a part of a tile it computes the whole."""


def perplexity(nll: float) -> float | None:
    """exp(nll), nll in nats a token; None where that is above the largest number (nll > 709.7)."""
    try:
        return math.exp(nll)
    except OverflowError:
        return None


def score(runner: ModelRunner, targets: Targets, wanted: Wanted, keep_hidden: bool) -> TokenScores:
    """The scores of ``targets``, on every rank. Collective.

    Raises:
        NumericsError: a layer, or the head, gave NaN or infinity.
    """
    count = targets.ids_RLA.shape[2]
    words_MF = torch.empty(0, width(count, wanted), dtype=torch.int32)
    hidden_Md = torch.empty(0, runner.dims.hidden_size, dtype=runner.dtype) if keep_hidden else None
    if targets.batch is not None:
        micro_batches, _ = runner.micro_batches(targets.batch)
        scorer = _Scorer(runner, targets, wanted, keep_hidden)
        nothing = [NO_POSITIONS for _ in micro_batches]
        shards = nan_check.checked(
            runner,
            lambda: runner.run_micro_batches(micro_batches, nothing, want_hidden=True, finish=scorer),
            lambda shard: shard.scores is None or bool(shard.scores.finite),
        )
        own = [shard.scores for shard in shards]
        words = [None if scores is None else scores.words_MF for scores in own]
        words_MF = _whole(runner, targets, micro_batches, words, words_MF)
        if hidden_Md is not None:
            hidden = [None if scores is None else scores.hidden_Md for scores in own]
            hidden_Md = _whole(runner, targets, micro_batches, hidden, hidden_Md)
    return scores_of(words_MF, hidden_Md, targets.positions, count, targets.flat, wanted)


def _whole(
    runner: ModelRunner, targets: Targets, micro_batches: list[Batch], local: list[Tensor | None], none: Tensor
) -> Tensor:
    """[M, *] of all scored tokens, on the host of every rank.

    Args:
        local: of each micro-batch what this rank has; None where it holds no results.
        none: what it has then.
    """
    assert targets.batch is not None
    transport, none = runner.mesh[runner.result_axis], none.to(runner.device)
    parts = []
    for batch, own in zip(micro_batches, local, strict=True):
        held = [runner.held_positions(batch.length, rank) for rank in range(transport.size)]
        held = [positions[positions < batch.length] for positions in held]
        scored_BL = _of(targets.scored_RL, batch)
        parts.append(assemble_ragged(none if own is None else own, held, scored_BL, transport))
    starts = sequence_starts(len(targets.batch.sequences), runner.mesh.topology.dp)
    scored = [int(targets.scored_RL[a:b].sum()) for a, b in pairwise(starts)]
    return gather_ragged(torch.cat(parts), scored, runner.mesh["dp"]).cpu()


def _of(values_RL: Tensor, batch: Batch) -> Tensor:
    return values_RL[batch.sequences.start : batch.sequences.stop, : batch.length]


class _Scorer:
    """Called with the results of each micro-batch on this rank, as they are made."""

    def __init__(self, runner: ModelRunner, targets: Targets, wanted: Wanted, keep_hidden: bool) -> None:
        self._decoder, self._tp = runner.decoder, runner.mesh["tp"]
        self._targets, self._wanted, self._keep_hidden = targets, wanted, keep_hidden

    def __call__(self, shard: Shard) -> Shard:
        """``shard`` with scores in place of hidden states."""
        hidden_BTd, batch = shard.hidden_BTd, shard.batch
        if hidden_BTd is None:
            return shard
        real = torch.nonzero(shard.positions_T < batch.length)[:, 0]
        ids_BTA = _of(self._targets.ids_RLA, batch)[:, shard.positions_T[real]]
        sequence, at = torch.nonzero(_of(self._targets.scored_RL, batch)[:, shard.positions_T[real]], as_tuple=True)
        tokens_M = to_device(sequence * hidden_BTd.shape[1] + real[at], hidden_BTd.device)
        targets_MC = to_device(ids_BTA[sequence, at], hidden_BTd.device)
        flat_Nd = hidden_BTd.flatten(0, 1)
        words = [targets_MC.new_empty(0, width(targets_MC.shape[1], self._wanted), dtype=torch.int32)]
        flags = [_finite(flat_Nd)]
        for part, finite in score_tokens(self._decoder, flat_Nd, tokens_M, targets_MC, self._wanted, self._tp):
            words.append(part)
            flags.append(finite)
        kept_Md = flat_Nd[tokens_M] if self._keep_hidden else None
        return replace(shard, hidden_BTd=None, scores=LocalScores(torch.cat(words), kept_Md, torch.stack(flags).all()))


@torch.inference_mode()
def score_tokens(
    decoder: Decoder, hidden_Nd: Tensor, tokens_M: Tensor, targets_MC: Tensor, wanted: Wanted, tp: Transport
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of the tokens ``tokens_M`` among ``hidden_Nd``, some at a time: as many as ``LOGIT_ELEMENTS`` has room for.

    Ranks that share layers have the same tokens, and each of them looks at the logits of some.

    Yields:
        (words [n, F] of the next n tokens, whether what this rank looked at is finite)
    """
    vocabulary = decoder.model.config.get_text_config().vocab_size
    size = max(1, LOGIT_ELEMENTS // vocabulary)
    size -= size % TILE if size > TILE else 0
    for tokens, targets in zip(tokens_M.split(size), targets_MC.split(size), strict=True):
        if not len(tokens):  # one empty part is what split makes of nothing
            continue
        left = -len(tokens) % tp.size
        padded_nC = pad(targets, (0, 0, 0, left), value=UNSCORED)
        share = slice(tp.rank * len(padded_nC) // tp.size, (tp.rank + 1) * len(padded_nC) // tp.size)
        # Logits have no name here, by which they would live beside the next ones.
        stats = scan(logits_of_share(decoder, hidden_Nd[pad(tokens, (0, left))], tp), padded_nC[share], wanted)
        own_nF = words_of(stats)
        yield own_nF if tp.size == 1 else tp.all_gather(own_nF).flatten(0, 1)[: len(tokens)], stats.finite


def _finite(hidden_Nd: Tensor) -> Tensor:
    """One bool on the device."""
    parts = hidden_Nd.split(max(1, LOGIT_ELEMENTS // hidden_Nd.shape[1]))
    return torch.stack([torch.isfinite(part).all() for part in parts]).all()
