"""The embedding and the head, cut by rows of the vocabulary: each rank holds those of some tokens.

An embedding's rows are asked of those who hold them. Where all ranks have the same token, as in decoding, each makes
the logits of its rows and they are gathered; where each has tokens of its own, the head's rows go round in blocks.
"""

# Shapes: M tokens of this rank, N ranks, V vocabulary, d hidden size, R rows that a rank holds.
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from ds_ring.transport.base import Transport
from ds_ring.weights.cut import bounds

AT_A_TIME = 64 << 20
"""Bytes of rows that are received at a time, about."""


class Table:
    """[V, d] held between ranks."""

    def __init__(self, whole_Vd: Tensor, transport: Transport) -> None:
        self.transport, self.count = transport, whole_Vd.shape[0]
        self.bounds = bounds(self.count, transport.size)
        self.share = self.bounds[1]
        first, last = self.bounds[transport.rank : transport.rank + 2]
        # As many rows on every rank, the last ones of no token: collectives take equal parts.
        self.own_Rd = pad(whole_Vd.detach()[first:last], (0, 0, 0, self.share - (last - first))).contiguous()

    def rows(self, ids_M: Tensor) -> Tensor:
        """[M, d]. Collective, with equally many on all ranks."""
        size, width = self.transport.size, self.own_Rd.shape[1]
        step = max(1, AT_A_TIME // (size * width * self.own_Rd.element_size()))
        return torch.cat([self._rows(part) for part in ids_M.split(step)])

    def _rows(self, ids_M: Tensor) -> Tensor:
        own_NM = self.transport.all_gather(ids_M) - self.bounds[self.transport.rank]
        # What another rank holds is not used.
        found_NMd = self.own_Rd[own_NM.clamp(0, self.share - 1)]
        from_NMd = self.transport.all_to_all(found_NMd)
        return from_NMd[ids_M // self.share, torch.arange(len(ids_M), device=ids_M.device)]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(the first token, its row and those of the next ones), over the whole vocabulary. Collective."""
        step = max(1, AT_A_TIME // (self.own_Rd.shape[1] * self.own_Rd.element_size()))
        for owner in range(self.transport.size):
            for start in range(0, self.bounds[owner + 1] - self.bounds[owner], step):
                stop = min(start + step, self.bounds[owner + 1] - self.bounds[owner])
                yield self.bounds[owner] + start, self.transport.broadcast(self.own_Rd[start:stop], owner)


class SharedEmbedding:
    """Called as the forward of an embedding: the module's own, on a table of the rows that it needs."""

    def __init__(self, module: nn.Module, table: Table) -> None:
        self._module, self._table = module, table
        vars(module)["padding_idx"] = None  # of training; it may be beyond the rows that are asked for

    def __call__(self, ids: Tensor) -> Any:
        rows = self._table.rows(ids.flatten())
        numbers = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        with _weight(self._module, rows):
            return type(self._module).forward(self._module, numbers)


class SharedHead:
    """Called as the forward of a head, a linear layer.

    Attributes:
        same_tokens: whether all ranks have the same tokens.
        unused: whether no rank wants logits.
    """

    def __init__(self, module: nn.Linear, table: Table) -> None:
        self._module, self._table = module, table
        self.same_tokens = self.unused = False
        self._whole_Vd: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        bias, count = self._module.bias, self._table.count
        if self._whole_Vd is not None:
            return linear(x, self._whole_Vd, bias)
        out = x.new_empty(*x.shape[:-1], count)
        if self.unused:
            return out
        if self.same_tokens:
            own = self._table.own_Rd
            everyones = self._table.transport.all_gather(linear(x, own))
            out = everyones.movedim(0, -2).flatten(-2)[..., :count]
            return out if bias is None else out + bias
        for first, rows in self._table.blocks():
            those = slice(first, first + len(rows))
            out[..., those] = linear(x, rows, None if bias is None else bias[those])
        return out

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside the block the head is whole on every rank: for many tokens, a block at a time. Collective."""
        own = self._table.own_Rd
        self._whole_Vd = own.new_empty(self._table.count, own.shape[1])
        for first, rows in self._table.blocks():
            self._whole_Vd[first : first + len(rows)] = rows
        try:
            yield
        finally:
            self._whole_Vd = None


@contextmanager
def _weight(module: nn.Module, weight: Tensor) -> Iterator[None]:
    own = module._parameters["weight"]
    module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        module._parameters["weight"] = own
