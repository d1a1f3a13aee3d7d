"""What layers with a sliding window keep of a cache: of each row the last tokens, which take turns in a few slots."""

# Shapes: B rows, S slots, T tokens on this rank.
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ds_ring.attention.backends.positions import EMPTY, grown


class Entry(NamedTuple):
    """Tokens on their way in: which slot each gets, [B, T] int64, and the positions [B, S] that were there before."""

    slots_BT: Tensor
    before_BS: Tensor


class SlidingWindowSlots:
    """Slots for all layers with one window, on one rank.

    A row's tokens on this rank are numbered as they come; number n gets slot 1 + n mod window. What it takes the place
    of is ``window`` of the row's tokens older, so at least as many positions, and no later query sees it. Rows count
    for themselves: a short row keeps what it has while a longer one goes on. Slot 0 takes whatever is not kept
    (padding, and what a long chunk outlives itself) and stays empty.

    Attributes:
        positions_BS: where each slot's token stands, int32.
    """

    def __init__(self, sequences: int, window: int, device: torch.device) -> None:
        self.window = window
        self.positions_BS = torch.full((sequences, 1), EMPTY, dtype=torch.int32, device=device)
        self._count_B1 = torch.zeros(sequences, 1, dtype=torch.long, device=device)

    @property
    def nbytes(self) -> int:
        return self.positions_BS.nbytes + self._count_B1.nbytes

    def held(self, used: int) -> int:
        """Slots that ``used`` tokens of a rank, padding among them, can have filled, slot 0 among them."""
        return 1 + min(used, self.window)

    def make_room(self, tokens: int) -> bool:
        """For ``tokens`` of a rank in all, or as many as it keeps; whether memory has moved."""
        wanted = self.held(tokens)
        if wanted <= self.positions_BS.shape[1]:
            return False
        self.positions_BS = grown(self.positions_BS, wanted)
        return True

    def enter(self, sequences: slice, positions_BT: Tensor) -> Entry:
        """Give slots to a chunk's tokens, of which ``EMPTY`` ones are padding; positions ascend along it."""
        valid_BT, count_B1 = positions_BT != EMPTY, self._count_B1[sequences]
        before_BS = self.positions_BS[sequences].clone()
        number_BT = count_B1 + valid_BT.cumsum(1) - 1
        count_B1 += valid_BT.sum(1, keepdim=True)
        kept_BT = valid_BT & (number_BT >= count_B1 - self.window)
        return Entry(self._place(sequences, number_BT, kept_BT, positions_BT), before_BS)

    def enter_token(self, stored_1: Tensor, positions_B1: Tensor) -> Tensor:
        """The slots [B, 1] of one token a row, where ``stored_1`` says that this rank stores it; asks the device
        nothing."""
        slots_B1 = self._place(slice(None), self._count_B1, stored_1.expand_as(positions_B1), positions_B1)
        self._count_B1 += stored_1
        return slots_B1

    def _place(self, sequences: slice, number_BT: Tensor, kept_BT: Tensor, positions_BT: Tensor) -> Tensor:
        slots_BT = torch.where(kept_BT, 1 + number_BT % self.window, 0)
        self.positions_BS[sequences].scatter_(1, slots_BT, torch.where(kept_BT, positions_BT, EMPTY))
        return slots_BT
