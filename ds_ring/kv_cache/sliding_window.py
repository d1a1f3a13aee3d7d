"""The cache of layers with a sliding window: the last tokens of each sequence, in slots that are used in rotation."""

# Shapes: B sequences, S slots, T tokens on this rank.
from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from ds_ring.attention.backends.positions import EMPTY, grown


class Entry(NamedTuple):
    """Tokens that enter: the slot of each, [B, T] int64, and the positions [B, S] before they entered."""

    slots_BT: Tensor
    before_BS: Tensor


class SlidingWindowSlots:
    """Slots of all layers with the same window, on one rank.

    The tokens of a sequence on this rank are numbered as they come; number n gets slot 1 + n mod window. It replaces
    the token that is ``window`` numbers older, so at least as many positions older, and which no later query sees. Each
    sequence counts for itself: a short one keeps its tokens while a longer one goes on. Slot 0 gets what is not kept
    (padding, and tokens that a long chunk pushes out itself) and stays empty.

    Attributes:
        positions_BS: position of the token in each slot, int32.
    """

    def __init__(self, sequences: int, window: int, device: torch.device) -> None:
        self.window = window
        self.positions_BS = torch.full((sequences, 1), EMPTY, dtype=torch.int32, device=device)
        self._count_B1 = torch.zeros(sequences, 1, dtype=torch.long, device=device)

    @property
    def nbytes(self) -> int:
        return self.positions_BS.nbytes + self._count_B1.nbytes

    def held(self, used: int) -> int:
        """Slots, slot 0 included, that ``used`` tokens of a rank, padding included, can have filled."""
        return 1 + min(used, self.window)

    def make_room(self, tokens: int) -> bool:
        """Make room for ``tokens`` of a rank in all, or as many as it keeps. Returns whether memory has moved."""
        wanted = self.held(tokens)
        if wanted <= self.positions_BS.shape[1]:
            return False
        self.positions_BS = grown(self.positions_BS, wanted)
        return True

    def selected(self, sequences_N: Tensor) -> SlidingWindowSlots:
        """Slots of these sequences, in this order, in memory of their own."""
        found = copy.copy(self)
        found.positions_BS = self.positions_BS.index_select(0, sequences_N)
        found._count_B1 = self._count_B1.index_select(0, sequences_N)
        return found

    def crop(self, limits_B1: Tensor) -> None:
        """Forget tokens at positions from ``limits_B1`` on. No token of a sequence may have been replaced so far, so
        that number n is in slot 1 + n."""
        gone_BS = self.positions_BS >= limits_B1
        self.positions_BS.masked_fill_(gone_BS, EMPTY)
        slots_S = torch.arange(gone_BS.shape[1], device=gone_BS.device)
        # A slot's number and the numbers before it have entered; those behind the last that is left come again.
        self._count_B1 = torch.where(gone_BS, 0, slots_S).amax(1, keepdim=True)

    def enter(self, sequences: slice, positions_BT: Tensor) -> Entry:
        """Give slots to the tokens of a chunk. ``EMPTY`` is padding; positions ascend."""
        valid_BT, count_B1 = positions_BT != EMPTY, self._count_B1[sequences]
        before_BS = self.positions_BS[sequences].clone()
        number_BT = count_B1 + valid_BT.cumsum(1) - 1
        count_B1 += valid_BT.sum(1, keepdim=True)
        kept_BT = valid_BT & (number_BT >= count_B1 - self.window)
        return Entry(self._assign(sequences, number_BT, kept_BT, positions_BT), before_BS)

    def enter_token(self, stored_1: Tensor, positions_B1: Tensor) -> Tensor:
        """The slots [B, 1] of one token of each sequence; ``stored_1``: whether this rank stores it. Nothing waits for
        the device."""
        slots_B1 = self._assign(slice(None), self._count_B1, stored_1.expand_as(positions_B1), positions_B1)
        self._count_B1 += stored_1
        return slots_B1

    def _assign(self, sequences: slice, number_BT: Tensor, kept_BT: Tensor, positions_BT: Tensor) -> Tensor:
        slots_BT = torch.where(kept_BT, 1 + number_BT % self.window, 0)
        self.positions_BS[sequences].scatter_(1, slots_BT, torch.where(kept_BT, positions_BT, EMPTY))
        return slots_BT
