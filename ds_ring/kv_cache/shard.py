"""One rank's shard of a key/value cache: its own tokens, with all heads it was given, and the position of each."""

# Shapes: B sequences, S filled slots, T tokens written at once, K key/value heads, D head_dim.
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ds_ring.attention.backends.positions import EMPTY, grown
from ds_ring.errors import UnsupportedModelError
from ds_ring.kv_cache.occupancy import Occupancy
from ds_ring.kv_cache.sliding_window import SlidingWindowSlots

GROWTH = 1.5
SMALLEST = 64
"""Slots of an allocation, at least, where it is not known how many are needed."""
EVERY = slice(None)
LOOK_AHEAD = 4096
"""New tokens for which memory is allocated in advance, at most: a generation may end long before its limit."""


class Cached(NamedTuple):
    """Keys and values [B, S, K, D] and their positions [B, S], int32, ``EMPTY`` where there is no token."""

    k_BSKD: Tensor
    v_BSKD: Tensor
    positions_BS: Tensor


class KVCacheShard:
    """Slots for tokens, the same for all sequences and layers. Layers with a sliding window have slots of their own,
    for what can still be seen (``SlidingWindowSlots``).

    Attributes:
        used: slots filled on every rank of the group. Each rank knows all of them, since who stores what follows from
            lengths alone.
        occupancy: in which of them a sequence has a token.
        moves: how often memory has moved. A captured graph is not valid after that.
    """

    def __init__(self, sequences: int, layers: int, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.device = rank, device
        self.used = [0] * size
        self.occupancy = Occupancy(sequences, size)
        self.moves = 0
        self._expected = 0
        self._positions_BS = torch.empty(sequences, 0, dtype=torch.int32, device=device)
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self._windows: dict[int, SlidingWindowSlots] = {}
        self._window_of: dict[int, int | None] = {}

    def emptied(self) -> KVCacheShard:
        """A shard for as many sequences and layers, which holds nothing."""
        return KVCacheShard(len(self._positions_BS), len(self._layers), self.rank, len(self.used), self.device)

    @property
    def nbytes(self) -> int:
        """Bytes held on this rank, empty slots included."""
        held = [t for pair in self._layers if pair is not None for t in pair]
        windows = sum(slots.nbytes for slots in self._windows.values())
        return self._positions_BS.nbytes + windows + sum(t.nbytes for t in held)

    @property
    def next_owner(self) -> int:
        """The rank that stores the next token: the one with the fewest, so that shards stay equal."""
        return self.used.index(min(self.used))

    def expect(self, tokens: int) -> None:
        """``tokens`` more will come one by one: the next growth makes room for them, and for no more than that.

        Otherwise a cache that a prompt fills exactly would be copied to grow by half for its first new token.
        """
        whole = sum(self.used) + min(tokens, LOOK_AHEAD)
        self._expected = max(max(self.used), -(-whole // len(self.used))) + 1  # the spare one

    def reserve(self, sequences: slice, start: int, positions_BT: Tensor) -> None:
        """Reserve slots from ``start`` on for tokens at ``positions_BT``; keys and values are written layer by
        layer."""
        stop = start + positions_BT.shape[1]
        self._make_room(stop)
        self._positions_BS[sequences, start:stop] = positions_BT

    def _make_room(self, slots: int) -> None:
        capacity = self._positions_BS.shape[1]
        if slots > capacity:
            # What was expected is enough, unless it was passed already.
            capacity = self._expected if slots <= self._expected else max(slots, int(GROWTH * capacity), SMALLEST)
            self._positions_BS = grown(self._positions_BS, capacity)
            self.moves += 1

    def write(self, layer: int, sequences: slice, start: int, k_BTKD: Tensor, v_BTKD: Tensor) -> None:
        """Write one layer's keys and values to reserved slots."""
        self._check_window(layer, None)
        for held, new in zip(self._room_in(layer, k_BTKD, v_BTKD), (k_BTKD, v_BTKD), strict=True):
            held[sequences, start : start + new.shape[1]] = new

    def window(self, window: int) -> SlidingWindowSlots:
        """The slots of layers that see ``window`` positions, with as much room as this shard has."""
        if window not in self._windows:
            self._windows[window] = SlidingWindowSlots(self._positions_BS.shape[0], window, self.device)
        slots = self._windows[window]
        self.moves += slots.make_room(self._positions_BS.shape[1])
        return slots

    def write_window(
        self, layer: int, window: int, sequences: slice, slots_BT: Tensor, k_BTKD: Tensor, v_BTKD: Tensor
    ) -> None:
        """``write`` for a layer with a sliding window, to the slots that ``SlidingWindowSlots`` gave."""
        self._check_window(layer, window)
        for held, new in zip(self._room_in(layer, k_BTKD, v_BTKD), (k_BTKD, v_BTKD), strict=True):
            held[sequences].scatter_(1, slots_BT[:, :, None, None].expand_as(new), new)

    def _check_window(self, layer: int, window: int | None) -> None:
        if self._window_of.setdefault(layer, window) != window:
            raise UnsupportedModelError(
                f"layer {layer} attends with a window of {window} behind one of {self._window_of[layer]}: what it has "
                f"let go of cannot be brought back"
            )

    def _positions_of(self, layer: int) -> Tensor:
        window = self._window_of[layer]
        return self._positions_BS if window is None else self._windows[window].positions_BS

    def _room_in(self, layer: int, k_BTKD: Tensor, v_BTKD: Tensor) -> tuple[Tensor, Tensor]:
        pair, (n_sequences, capacity) = self._layers[layer], self._positions_of(layer).shape
        if pair is None or pair[0].shape[1] < capacity:
            # Zeros, since hidden values are multiplied by 0, which does not remove NaN.
            grown = [t.new_zeros((n_sequences, capacity, *t.shape[2:])) for t in (k_BTKD, v_BTKD)]
            for new, old in zip(grown, pair or (), strict=False):
                new[:, : old.shape[1]] = old
            pair = self._layers[layer] = grown[0], grown[1]
            self.moves += 1
        return pair

    def take_token(self) -> int:
        """Give the next token of all sequences a slot on one rank, and make room for it. Returns the slot on this rank.

        On other ranks it is a spare slot, which stays empty, so that all ranks launch the same kernels.
        """
        owner = self.next_owner
        slot = self.used[owner]
        self.used[owner] += 1
        self.occupancy.add_to_all(owner, slot)
        self._make_room(max(self.used) + 1)
        return slot if owner == self.rank else self._spare

    def reserve_token(self, slot_1: Tensor, positions_B1: Tensor) -> None:
        """``reserve`` for one token of each sequence, in the slot that ``take_token`` gave; nothing waits for the
        device."""
        self._positions_BS.index_copy_(1, slot_1, torch.where(self.stored_here(slot_1), positions_B1, EMPTY))

    def write_token(self, layer: int, slot_1: Tensor, k_B1KD: Tensor, v_B1KD: Tensor) -> None:
        """``write`` for one token of each sequence."""
        self._check_window(layer, None)
        for held, new in zip(self._room_in(layer, k_B1KD, v_B1KD), (k_B1KD, v_B1KD), strict=True):
            held.index_copy_(1, slot_1, new)

    def stored_here(self, slot_1: Tensor) -> Tensor:
        """Whether ``take_token`` gave a slot on this rank, [1] bool."""
        return slot_1 != self._spare

    @property
    def _spare(self) -> int:
        return self._positions_BS.shape[1] - 1

    def read(self, layer: int, sequences: slice = EVERY, stop: int | None = None) -> Cached:
        """The first ``stop`` slots, or all, as views. The layer must have been written once."""
        pair = self._layers[layer]
        assert pair is not None
        return Cached(pair[0][sequences, :stop], pair[1][sequences, :stop], self._positions_of(layer)[sequences, :stop])

    def hide(self, hidden_BC: Tensor, first_B: Tensor) -> None:
        """Forget the tokens in the columns marked in ``hidden_BC``; ``first_B`` are the columns of position 0. Both on
        the CPU."""
        self.occupancy.lose(hidden_BC.any(1).nonzero()[:, 0].tolist())
        hidden_BC, first_B = hidden_BC.to(self.device), first_B.to(self.device)
        for positions_BS in (self._positions_BS, *(slots.positions_BS for slots in self._windows.values())):
            columns_BS = (positions_BS + first_B[:, None]).clamp(max=hidden_BC.shape[1] - 1).long()
            gone_BS = hidden_BC.gather(1, columns_BS) & (positions_BS != EMPTY)
            positions_BS.masked_fill_(gone_BS, EMPTY)
