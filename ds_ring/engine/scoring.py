"""Log-likelihoods of tokens, computed on the rank that holds their hidden states."""

# Shapes: B sequences, L tokens of the batch, T of them on this rank, k of those at a time, V vocabulary, d hidden size.
from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, pad

from ds_ring.engine.batch import Batch
from ds_ring.engine.model_runner import Shard
from ds_ring.hf.decoder import Decoder, head_logits
from ds_ring.utils.device import to_device

CHUNK = 1024
"""Tokens of a sequence whose logits exist at the same time."""


def perplexity(nll: float) -> float | None:
    """exp(nll), nll in nats a token; None where that is above the largest number (nll > 709.7)."""
    try:
        return math.exp(nll)
    except OverflowError:
        return None


def of_shard(decoder: Decoder, shard: Shard) -> Tensor | None:
    """[B, T] fp32 of the tokens of ``shard`` that are no padding; None where it has no hidden states."""
    if shard.hidden_BTd is None:
        return None
    scores_BT = next_token_log_likelihoods(decoder, shard.batch, shard.positions_T, shard.hidden_BTd)
    return scores_BT[:, shard.positions_T < shard.batch.length]


@torch.inference_mode()
def next_token_log_likelihoods(decoder: Decoder, batch: Batch, positions_T: Tensor, hidden_BTd: Tensor) -> Tensor:
    """[B, T] fp32: at each held position the log-likelihood in nats of the token after it; 0 where there is none."""
    at_T = positions_T.clamp(max=batch.length - 1)
    next_ids_BT = to_device(pad(batch.ids_BL, (0, 1))[:, at_T + 1], hidden_BTd.device)
    parts = []
    for start in range(0, hidden_BTd.shape[1], CHUNK):
        tokens = slice(start, start + CHUNK)
        logits_BkV = head_logits(decoder, hidden_BTd[:, tokens]).float()
        parts.append(log_softmax(logits_BkV, dim=-1).gather(2, next_ids_BT[:, tokens, None])[..., 0])
    last_B1 = torch.tensor(batch.lengths)[:, None] - 1
    has_next_BT = to_device(positions_T[None] < last_B1, hidden_BTd.device)
    return torch.where(has_next_BT, torch.cat(parts, dim=1), 0.0)
