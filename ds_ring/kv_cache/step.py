"""One forward pass against a cache: its keys and values are stored, and its queries attend to all that is cached."""

# Shapes: B sequences, T tokens on this rank, H query heads, K key/value heads, D head_dim.
from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ds_ring.attention.backends.positions import BLIND, EMPTY
from ds_ring.attention.spec import AttentionSpec
from ds_ring.config import RingVariant
from ds_ring.kv_cache.attention import all_heads, attend_replicated, attend_sliced, attend_spread
from ds_ring.kv_cache.occupancy import SlotRanges
from ds_ring.kv_cache.shard import EVERY, Cached, KVCacheShard
from ds_ring.kv_cache.sliding_window import Entry
from ds_ring.transport.base import Transport


@dataclass(frozen=True)
class Step(ABC):
    """The constructor reserves slots for the tokens; their keys and values are stored layer by layer."""

    cache_shard: KVCacheShard

    is_first = False
    """Nothing was cached before: the tokens attend to each other only."""

    @abstractmethod
    def store_layer(self, layer: int, k_BTKD: Tensor, v_BTKD: Tensor, window: int | None) -> None:
        """Store keys and values of tokens that attend to each other only."""

    @abstractmethod
    def attend(
        self,
        layer: int,
        q_BTHD: Tensor,
        k_BTKD: Tensor,
        v_BTKD: Tensor,
        *,
        spec: AttentionSpec,
        transport: Transport,
        sinks_H: Tensor | None,
        variant: RingVariant,
    ) -> Tensor:
        """Store the keys and values, then attend to the shards of all ranks, these included; out [B, T, H, D]."""


@dataclass(frozen=True)
class ChunkStep(Step):
    """A chunk of a prompt, whose tokens are spread over the ranks, equally many on each.

    Attributes:
        sequences: which sequences of the cache these are.
        positions_BT: positions of this rank's tokens, int32; ``EMPTY`` for padding.
        starts, held: slots filled on every rank before and after.
        seen: of every rank's slots before ``starts``, the ranges in which each sequence has a token; between them none
            has.
    """

    sequences: slice
    positions_BT: Tensor
    starts: tuple[int, ...]
    held: tuple[int, ...]
    seen: tuple[SlotRanges, ...]
    is_first: bool
    _entries: dict[int, Entry] = field(default_factory=dict, init=False)
    """By window; all layers with that window get the same slots."""

    def __post_init__(self) -> None:
        if self.positions_BT.shape[1]:
            self.cache_shard.reserve(self.sequences, self.starts[self.cache_shard.rank], self.positions_BT)

    def store_layer(self, layer: int, k_BTKD: Tensor, v_BTKD: Tensor, window: int | None) -> None:
        if window is not None:
            slots_BT = self._entry(window).slots_BT
            self.cache_shard.write_window(layer, window, self.sequences, slots_BT, k_BTKD, v_BTKD)
        elif self.positions_BT.shape[1]:
            self.cache_shard.write(layer, self.sequences, self.starts[self.cache_shard.rank], k_BTKD, v_BTKD)

    def attend(
        self,
        layer: int,
        q_BTHD: Tensor,
        k_BTKD: Tensor,
        v_BTKD: Tensor,
        *,
        spec: AttentionSpec,
        transport: Transport,
        sinks_H: Tensor | None,
        variant: RingVariant,
    ) -> Tensor:
        own = self.cache_shard.rank
        if spec.window is None:
            self.store_layer(layer, k_BTKD, v_BTKD, None)
            held, cached = list(self.held), self.cache_shard.read(layer, self.sequences, self.held[own])
            seen = self.seen
        else:
            # The last of these tokens may replace cached tokens that the first of them see.
            slots = self.cache_shard.window(spec.window)
            behind = [slots.held(start) for start in self.starts]
            held = [b + after - before for b, after, before in zip(behind, self.held, self.starts, strict=True)]
            cached = self._cached_and_new(layer, spec.window, behind[own], k_BTKD, v_BTKD)
            self.store_layer(layer, k_BTKD, v_BTKD, spec.window)
            seen = ()
        q_positions_BT = self.positions_BT.masked_fill(self.positions_BT == EMPTY, BLIND)
        return attend_spread(
            q_BTHD, cached, q_positions_BL=q_positions_BT, held=held, spec=spec, transport=transport,
            seen=seen, sinks_H=sinks_H, variant=variant,
        )  # fmt: skip

    def _cached_and_new(self, layer: int, window: int, behind: int, k_BTKD: Tensor, v_BTKD: Tensor) -> Cached:
        """What the layer has cached, followed by these tokens."""
        before_BS = self._entry(window).before_BS[:, :behind]
        kept = self.cache_shard.read(layer, self.sequences, behind)
        return Cached(
            torch.cat((kept.k_BSKD, k_BTKD), dim=1),
            torch.cat((kept.v_BSKD, v_BTKD), dim=1),
            torch.cat((before_BS, self.positions_BT), dim=1),
        )

    def _entry(self, window: int) -> Entry:
        if window not in self._entries:
            self._entries[window] = self.cache_shard.window(window).enter(self.sequences, self.positions_BT)
        return self._entries[window]


@dataclass(frozen=True)
class TokenStep(Step):
    """One token of each sequence, the same on all ranks; one rank stores it.

    Which rank stores it, and in which slot, is in tensors, and shapes depend on the capacity of the cache alone: the
    next token takes the same kernel launches, which can be captured in a CUDA graph.

    Attributes:
        positions_B1: positions of the tokens, int32.
        slot_1: the slot they get on this rank, int64; the spare one where another rank stores them.
        sliced: each rank has its share of the heads.
    """

    positions_B1: Tensor
    slot_1: Tensor
    sliced: bool
    _slots_B1: dict[int, Tensor] = field(default_factory=dict, init=False)
    """By window."""

    def __post_init__(self) -> None:
        self.cache_shard.reserve_token(self.slot_1, self.positions_B1)

    def store_layer(self, layer: int, k_BTKD: Tensor, v_BTKD: Tensor, window: int | None) -> None:
        if window is None:
            self.cache_shard.write_token(layer, self.slot_1, k_BTKD, v_BTKD)
            return
        if window not in self._slots_B1:
            stored_1 = self.cache_shard.stored_here(self.slot_1)
            self._slots_B1[window] = self.cache_shard.window(window).enter_token(stored_1, self.positions_B1)
        self.cache_shard.write_window(layer, window, EVERY, self._slots_B1[window], k_BTKD, v_BTKD)

    def attend(
        self,
        layer: int,
        q_BTHD: Tensor,
        k_BTKD: Tensor,
        v_BTKD: Tensor,
        *,
        spec: AttentionSpec,
        transport: Transport,
        sinks_H: Tensor | None,
        variant: RingVariant,
    ) -> Tensor:
        if self.sliced:
            k_BTKD, v_BTKD = all_heads(torch.cat((k_BTKD, v_BTKD), dim=-1), transport).chunk(2, dim=-1)
        self.store_layer(layer, k_BTKD, v_BTKD, spec.window)
        cached = self.cache_shard.read(layer)
        if self.sliced:
            share = q_BTHD.shape[2]
            own = None if sinks_H is None else sinks_H.narrow(0, transport.rank * share, share)
            return attend_sliced(
                q_BTHD, cached, q_positions_BL=self.positions_B1, spec=spec, transport=transport, sinks_h=own
            )
        return attend_replicated(
            q_BTHD, cached, q_positions_BL=self.positions_B1, spec=spec, transport=transport, sinks_H=sinks_H
        )
