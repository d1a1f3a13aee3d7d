"""What is asked of a distribution over the vocabulary, from logits of which some columns at a time are looked at.

The sums are those of an online softmax (Milakov and Gimelshein, 2018): with m the largest logit so far, of temperature
t, s = sum exp((z - m) / t) and w = sum exp((z - m) / t) (z - m) / t. When m grows by d, s and w + s d' take the factor
exp(d'), d' = -d / t. At the end log p(y) = (z_y - m) / t - log s, and the entropy is log s - w / s.
"""

# Shapes: M tokens, V vocabulary, N of its columns at a time, C targets of a token, K likeliest tokens.
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_ring.utils.unscored import UNSCORED

COLUMN_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 23}
"""Logits that exist in fp32 at a time: what a cache holds, and on a GPU what is worth a kernel's start."""
LOWEST = torch.finfo(torch.float32).min
NO_WEIGHT = -200.0
"""An exponent whose exp is 0 in fp32; times it, unlike times -inf, 0 stays 0."""


@dataclass(frozen=True)
class Wanted:
    """What is wanted beside log-probabilities and ranks: the ``top_k`` likeliest tokens, the entropy in nats.

    ``temperature`` divides the logits first.
    """

    top_k: int = 0
    entropy: bool = False
    temperature: float = 1.0


@dataclass(frozen=True)
class Stats:
    """Of M tokens. Log-probabilities and entropies in nats, fp32; everything of an unscored target is 0.

    Attributes:
        log_probs_MC: of the targets.
        ranks_MC: int64; 1 + how many tokens have a larger logit than the target.
        is_argmax_MC: whether the target is the likeliest token, of equal ones that with the lowest id.
        top_ids_MK, top_log_probs_MK: the likeliest tokens, likeliest first; None where not wanted.
        entropies_M: None where not wanted.
        finite: one bool on the device: no logit was NaN or +infinity, and no target's -infinity, which others may be
            where a model masks tokens.
    """

    log_probs_MC: Tensor
    ranks_MC: Tensor
    is_argmax_MC: Tensor
    top_ids_MK: Tensor | None
    top_log_probs_MK: Tensor | None
    entropies_M: Tensor | None
    finite: Tensor


def scan(logits_MV: Tensor, targets_MC: Tensor, wanted: Wanted) -> Stats:
    """``logits_MV`` in any dtype; beside it ``COLUMN_ELEMENTS`` fp32 values exist at a time, a few times over."""
    tokens, vocabulary = logits_MV.shape
    columns = max(1, COLUMN_ELEMENTS[logits_MV.device.type] // max(tokens, 1))
    scored_MC = targets_MC != UNSCORED
    target_logits_MC = logits_MV.gather(1, targets_MC.clamp(min=0)).float()
    larger = _Larger(target_logits_MC)
    sums, likeliest = _Sums(logits_MV, wanted), _Likeliest(logits_MV, wanted.top_k)
    for start in range(0, vocabulary, columns):
        block_MN = logits_MV[:, start : start + columns].float()
        larger.add(block_MN)
        sums.add(block_MN, start)
        likeliest.add(block_MN, start)
    log_probs_MC = torch.where(scored_MC, sums.log_probs(target_logits_MC), 0.0)
    log_sum_M = sums.log_sum_M
    return Stats(
        log_probs_MC,
        torch.where(scored_MC, 1 + larger.counts_MC(), 0),
        scored_MC & (targets_MC == sums.argmax_M[:, None]),
        likeliest.ids_MK if wanted.top_k else None,
        sums.log_probs(likeliest.logits_MK) if wanted.top_k else None,
        log_sum_M - sums.weighted_M / sums.sum_M if wanted.entropy else None,
        torch.isfinite(log_sum_M + sums.max_M).all() & torch.isfinite(log_probs_MC).all(),
    )


class _Sums:
    """Running maximum, where it is, and the sums above."""

    def __init__(self, like_MV: Tensor, wanted: Wanted) -> None:
        count = like_MV.shape[0]
        self._wanted = wanted
        self.max_M = like_MV.new_full((count,), LOWEST, dtype=torch.float32)
        self.argmax_M = like_MV.new_zeros(count, dtype=torch.long)
        self.sum_M = torch.zeros_like(self.max_M)
        self.weighted_M = torch.zeros_like(self.max_M)

    @property
    def log_sum_M(self) -> Tensor:
        """Relative to the maximum."""
        return self.sum_M.log()

    def add(self, block_MN: Tensor, start: int) -> None:
        largest_M, where_M = block_MN.max(1)
        # Strictly larger: of equal logits the first counts, as in torch.argmax.
        self.argmax_M = torch.where(largest_M > self.max_M, where_M + start, self.argmax_M)
        max_M = torch.maximum(self.max_M, largest_M)
        # In place, and nothing that is not needed: on a GPU the passes over a block take as long as its product.
        shift_M, shifted_MN = self.max_M - max_M, block_MN - max_M[:, None]
        if self._wanted.temperature != 1:
            shift_M.div_(self._wanted.temperature)
            shifted_MN.div_(self._wanted.temperature)
        scale_M = shift_M.exp()
        if self._wanted.entropy:
            weights_MN = shifted_MN.clamp_(min=NO_WEIGHT).exp()
            grown_M = (self.weighted_M + self.sum_M * shift_M.clamp_(min=NO_WEIGHT)).mul_(scale_M)
            self.sum_M = self.sum_M * scale_M + weights_MN.sum(1)
            self.weighted_M = grown_M + weights_MN.mul_(shifted_MN).sum(1)
        else:
            self.sum_M = self.sum_M * scale_M + shifted_MN.exp_().sum(1)
        self.max_M = max_M

    def log_probs(self, logits: Tensor) -> Tensor:
        """Of some logits of each token, [M, *]."""
        return (logits - self.max_M[:, None]).div_(self._wanted.temperature) - self.log_sum_M[:, None]


class _Larger:
    """How many logits are larger than each target's."""

    def __init__(self, target_logits_MC: Tensor) -> None:
        self._targets_MC, self._order_MC = target_logits_MC.sort(1)
        # histogram[i]: of the logits seen, those that are larger than i targets
        self._histogram = target_logits_MC.new_zeros(len(target_logits_MC), 1 + target_logits_MC.shape[1])

    def add(self, block_MN: Tensor) -> None:
        if self._targets_MC.shape[1] == 1:
            self._histogram[:, 1] += (block_MN > self._targets_MC).sum(1)
            return
        smaller_MN = torch.searchsorted(self._targets_MC, block_MN.contiguous())
        self._histogram.scatter_add_(1, smaller_MN, torch.ones_like(block_MN))

    def counts_MC(self) -> Tensor:
        sorted_MC = self._histogram[:, 1:].flip(1).cumsum(1).flip(1).long()
        return torch.empty_like(sorted_MC).scatter_(1, self._order_MC, sorted_MC)


class _Likeliest:
    """The largest logits so far, largest first, and whose they are."""

    def __init__(self, like_MV: Tensor, count: int) -> None:
        self._count = count
        self.logits_MK = like_MV.new_empty(len(like_MV), 0, dtype=torch.float32)
        self.ids_MK = like_MV.new_empty(len(like_MV), 0, dtype=torch.long)

    def add(self, block_MN: Tensor, start: int) -> None:
        if not self._count:
            return
        logits_MK, ids_MK = block_MN.topk(min(self._count, block_MN.shape[1]), dim=1)
        logits_MK = torch.cat([self.logits_MK, logits_MK], dim=1)
        ids_MK = torch.cat([self.ids_MK, ids_MK + start], dim=1)
        logits_MK, order_MK = logits_MK.sort(dim=1, descending=True, stable=True)
        self.logits_MK = logits_MK[:, : self._count]
        self.ids_MK = ids_MK.gather(1, order_MK)[:, : self._count]
