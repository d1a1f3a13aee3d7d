"""One forward of a generation: its tokens go into a store, and attend to all that is there."""

# Shapes: B rows, l tokens on this rank, H query heads, K key/value heads, D head_dim.
from __future__ import annotations

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
class Step:
    """One forward's tokens on one rank. Making it reserves their slots; their keys and values follow by layer.

    Attributes:
        rows: which of the store's rows these are.
        positions_Bl: where this rank's tokens stand, int32; ``EMPTY`` for padding.
        starts, held: the slots filled on every rank before and after.
        replicated: all ranks have the same tokens, and the one whose ``held`` grows stores them; otherwise each rank
            has tokens of its own.
        is_first: nothing was cached before, so that the tokens attend to each other only.
        sliced: of replicated tokens, each rank has its share of the heads.
    """

    store: KVStore
    rows: slice
    positions_Bl: Tensor
    starts: tuple[int, ...]
    held: tuple[int, ...]
    replicated: bool = False
    is_first: bool = False
    sliced: bool = False

    def __post_init__(self) -> None:
        if self._stores:
            self.store.place(self.rows, self.starts[self.store.rank], self.positions_Bl)

    @property
    def _stores(self) -> bool:
        return self.held[self.store.rank] > self.starts[self.store.rank]

    def store_layer(self, layer: int, k_BlKD: Tensor, v_BlKD: Tensor, transport: Transport) -> None:
        if self.sliced:
            k_BlKD, v_BlKD = all_heads(torch.cat((k_BlKD, v_BlKD), dim=-1), transport).chunk(2, dim=-1)
        if self._stores:
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
        """Against the store of every rank, these tokens' own keys among them; out [B, l, H, D]."""
        cached = self.store.read(layer, self.rows, self.held[self.store.rank])
        if self.sliced:
            share = q_BlHD.shape[2]
            own = None if sinks_H is None else sinks_H.narrow(0, transport.rank * share, share)
            return attend_sliced(
                q_BlHD, cached, q_positions_BL=self.positions_Bl, spec=spec, transport=transport, sinks_h=own
            )
        if self.replicated:
            return attend_replicated(
                q_BlHD, cached, q_positions_BL=self.positions_Bl, spec=spec, transport=transport, sinks_H=sinks_H
            )
        q_positions_Bl = self.positions_Bl.masked_fill(self.positions_Bl == EMPTY, BLIND)
        return attend_spread(
            q_BlHD, cached, q_positions_BL=q_positions_Bl, held=list(self.held), spec=spec, transport=transport,
            sinks_H=sinks_H, variant=variant,
        )  # fmt: skip
