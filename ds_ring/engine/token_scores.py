"""The scores of tokens as users get them, and as words that travel between ranks."""

# Shapes: M scored tokens, n of one sequence, C targets of a token, K likeliest tokens, F words of a token, d hidden.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_ring.engine.vocabulary_scan import Stats, Wanted


@dataclass(frozen=True)
class TokenScores:
    """Of each sequence, in the order given, one tensor on the host; n is how many of its tokens are scored.

    A token is scored by the logits at it: those of what follows it. So the log-probability that belongs to position t
    of a text is that of the target of token t. n is 0 for a sequence that has no target, such as one of a single token.

    Attributes:
        positions: [n] int64, ascending: which tokens, counted in the sequence from 0, padding left out.
        log_probs: [n], or [n, C] for C targets a token, fp32, nats. Of a target of -100 beside others that count: 0.
        ranks: int64 of the same shape: 1 + how many tokens of the vocabulary have a larger logit; of such a target 0.
        is_argmax: bool of the same shape: the target is the likeliest token; of equal ones, the one of the lowest id.
        top_ids: [n, top_k] int64, likeliest first (equal ones in any order, but always the same); None for top_k=0.
        top_log_probs: [n, top_k] fp32, theirs.
        entropies: [n] fp32, nats, of the whole distribution; None unless asked for.
        hidden_states: [n, d] in the model's dtype: what the head is given; None unless asked for.
    """

    positions: list[Tensor]
    log_probs: list[Tensor]
    ranks: list[Tensor]
    is_argmax: list[Tensor]
    top_ids: list[Tensor] | None
    top_log_probs: list[Tensor] | None
    entropies: list[Tensor] | None
    hidden_states: list[Tensor] | None


@dataclass(frozen=True)
class LocalScores:
    """What this rank has of a micro-batch.

    Attributes:
        words_MF: of its scored tokens, sequence by sequence (``words_of``).
        hidden_Md: their hidden states, where they were asked for.
        finite: one bool on the device: neither hidden states nor logits had NaN or infinity.
    """

    words_MF: Tensor
    hidden_Md: Tensor | None
    finite: Tensor


def words_of(stats: Stats) -> Tensor:
    """[M, F] int32: everything of a token beside each other, bit by bit."""
    floats = [stats.log_probs_MC, stats.top_log_probs_MK, stats.entropies_M]
    whole = [stats.ranks_MC, stats.is_argmax_MC, stats.top_ids_MK]
    parts = [part.contiguous().view(torch.int32) for part in floats if part is not None]
    parts += [part.to(torch.int32) for part in whole if part is not None]
    return torch.cat([part.flatten(1) if part.dim() > 1 else part[:, None] for part in parts], dim=1)


def width(targets: int, wanted: Wanted) -> int:
    """How many words a token has."""
    return 3 * targets + 2 * wanted.top_k + wanted.entropy


def scores_of(
    words_MF: Tensor,
    hidden_Md: Tensor | None,
    positions: Sequence[Tensor],
    targets: int,
    flat: bool,
    wanted: Wanted,
) -> TokenScores:
    """Words of all tokens, on the host, as users get them.

    Args:
        positions: of each sequence, as in ``TokenScores``; its tokens come one after the other.
        targets: of each token.
        flat: the caller gave one target a token, and gets tensors without that dimension.
    """
    sizes, top_k, entropy = [len(p) for p in positions], wanted.top_k, int(wanted.entropy)
    parts = words_MF.split([targets, top_k, entropy, targets, targets, top_k], dim=1)
    log_probs, top_log_probs, entropies = (part.contiguous().view(torch.float32) for part in parts[:3])
    ranks, is_argmax, top_ids = (part.long() for part in parts[3:])

    def ragged(whole: Tensor) -> list[Tensor]:
        return list(whole.split(sizes))

    def of_targets(whole_MC: Tensor) -> list[Tensor]:
        return ragged(whole_MC[:, 0] if flat else whole_MC)

    return TokenScores(
        list(positions),
        of_targets(log_probs),
        of_targets(ranks),
        of_targets(is_argmax.bool()),
        ragged(top_ids) if top_k else None,
        ragged(top_log_probs) if top_k else None,
        ragged(entropies[:, 0]) if entropy else None,
        None if hidden_Md is None else ragged(hidden_Md),
    )
