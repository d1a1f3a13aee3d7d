"""Log-likelihoods from hidden states, where those are."""

# Shapes: B rows, L tokens of the batch, l of them on this rank, k of those at a time, V vocabulary, d hidden size.
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, pad

from ds_ring.engine.batch import Batch
from ds_ring.hf.decoder import Anatomy, head_logits
from ds_ring.utils.hardware import to_device

CHUNK = 1024
"""Tokens of a row whose logits exist at a time."""


@torch.inference_mode()
def next_token_log_likelihoods(anatomy: Anatomy, batch: Batch, positions_l: Tensor, hidden_Bld: Tensor) -> Tensor:
    """[B, l] fp32: at each held position the log-likelihood in nats of the token after it; 0 where there is none."""
    at_l = positions_l.clamp(max=batch.length - 1)
    next_ids_Bl = to_device(pad(batch.ids_BL, (0, 1))[:, at_l + 1], hidden_Bld.device)
    parts = []
    for start in range(0, hidden_Bld.shape[1], CHUNK):
        tokens = slice(start, start + CHUNK)
        logits_BkV = head_logits(anatomy, hidden_Bld[:, tokens]).float()
        parts.append(log_softmax(logits_BkV, dim=-1).gather(2, next_ids_Bl[:, tokens, None])[..., 0])
    last_B1 = torch.tensor(batch.lengths)[:, None] - 1
    has_next_Bl = to_device(positions_l[None] < last_B1, hidden_Bld.device)
    return torch.where(has_next_Bl, torch.cat(parts, dim=1), 0.0)
