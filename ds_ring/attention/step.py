"""One forward of a generation: its tokens go into a store, and attend to all that is there."""

# Shapes: B rows, l tokens on this rank, H query heads, K key/value heads, D head_dim.
from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_ring.attention.cached import all_heads, attend_replicated, attend_sliced, attend_spread
from ds_ring.attention.positions import BLIND, EMPTY
from ds_ring.attention.spec import AttentionSpec
from ds_ring.attention.store import KVStore
from ds_ring.config import RingVariant
from ds_ring.transport.base import Transport


@dataclass(frozen=True)
class Step(ABC):
    """Making one reserves its tokens' slots; their keys and values follow by layer."""

    store: KVStore

    is_first = False
    """Nothing was cached before, so that the tokens attend to each other only."""

    @abstractmethod
    def store_layer(self, layer: int, k_BlKD: Tensor, v_BlKD: Tensor, transport: Transport) -> None: ...

    @abstractmethod
    def attend(
        self,
        layer: int,
        q_BlHD: Tensor,
        *,
        spec: AttentionSpec,
        transport: Transport,
        sinks_H: Tensor | None,
        variant: RingVariant,
    ) -> Tensor:
        """Against the store of every rank, these tokens' own keys among them; out [B, l, H, D]."""


@dataclass(frozen=True)
class ChunkStep(Step):
    """Tokens that are spread over the ranks, as many on each.

    Attributes:
        rows: which of the store's rows these are.
        positions_Bl: where this rank's tokens stand, int32; ``EMPTY`` for padding.
        starts, held: the slots filled on every rank before and after.
    """

    rows: slice
    positions_Bl: Tensor
    starts: tuple[int, ...]
    held: tuple[int, ...]
    is_first: bool

    def __post_init__(self) -> None:
        if self.positions_Bl.shape[1]:
            self.store.place(self.rows, self.starts[self.store.rank], self.positions_Bl)

    def store_layer(self, layer: int, k_BlKD: Tensor, v_BlKD: Tensor, transport: Transport) -> None:
        if self.positions_Bl.shape[1]:
            self.store.write(layer, self.rows, self.starts[self.store.rank], k_BlKD, v_BlKD)

    def attend(
        self,
        layer: int,
        q_BlHD: Tensor,
        *,
        spec: AttentionSpec,
        transport: Transport,
        sinks_H: Tensor | None,
        variant: RingVariant,
    ) -> Tensor:
        cached = self.store.read(layer, self.rows, self.held[self.store.rank])
        q_positions_Bl = self.positions_Bl.masked_fill(self.positions_Bl == EMPTY, BLIND)
        return attend_spread(
            q_BlHD, cached, q_positions_BL=q_positions_Bl, held=list(self.held), spec=spec, transport=transport,
            sinks_H=sinks_H, variant=variant,
        )  # fmt: skip


@dataclass(frozen=True)
class TokenStep(Step):
    """A token in each row, the same on all ranks, of which one stores it.

    Who does, and where it stands, is told by tensors, and shapes depend on the store's capacity alone: the next token
    takes the same launches, which can be captured in a graph.

    Attributes:
        positions_B1: where the tokens stand, int32.
        slot_1: the slot they get on this rank, int64; the store's spare one where another rank stores them.
        sliced: each rank has its share of the heads.
    """

    positions_B1: Tensor
    slot_1: Tensor
    sliced: bool

    def __post_init__(self) -> None:
        self.store.place_token(self.slot_1, self.positions_B1)

    def store_layer(self, layer: int, k_BlKD: Tensor, v_BlKD: Tensor, transport: Transport) -> None:
        if self.sliced:
            k_BlKD, v_BlKD = all_heads(torch.cat((k_BlKD, v_BlKD), dim=-1), transport).chunk(2, dim=-1)
        self.store.write_token(layer, self.slot_1, k_BlKD, v_BlKD)

    def attend(
        self,
        layer: int,
        q_BlHD: Tensor,
        *,
        spec: AttentionSpec,
        transport: Transport,
        sinks_H: Tensor | None,
        variant: RingVariant,
    ) -> Tensor:
        cached = self.store.read(layer)
        if self.sliced:
            share = q_BlHD.shape[2]
            own = None if sinks_H is None else sinks_H.narrow(0, transport.rank * share, share)
            return attend_sliced(
                q_BlHD, cached, q_positions_BL=self.positions_B1, spec=spec, transport=transport, sinks_h=own
            )
        return attend_replicated(
            q_BlHD, cached, q_positions_BL=self.positions_B1, spec=spec, transport=transport, sinks_H=sinks_H
        )
