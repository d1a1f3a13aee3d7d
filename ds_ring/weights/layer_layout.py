"""Where the parameters of a layer lie: in the buffer that holds the whole layer, and in a rank's part of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ds_ring.hf.tp_plan import style_of
from ds_ring.weights.cut import Cut, cut_of

ALIGNMENT = 256
"""Bytes: of every parameter in memory, as PyTorch's own allocator has them."""


@dataclass(frozen=True)
class Entry:
    """A parameter that ranks hold between them.

    Attributes:
        name: in the layer, e.g. ``self_attn.q_proj.weight``.
        at: bytes from the start of the whole layer.
        part_at: bytes from the start of a rank's part of the layer, by rank.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    cut: Cut
    at: int
    part_at: tuple[int, ...]

    def whole(self, memory: Tensor) -> Tensor:
        """The parameter in ``memory``, uint8, of the whole layer."""
        return _view(memory, self.at, self.shape, self.dtype)

    def part(self, memory: Tensor, rank: int) -> Tensor:
        """``rank``'s part of it in ``memory``, uint8, of that rank's part of the layer."""
        return _view(memory, self.part_at[rank], self.cut.shape(self.shape, rank), self.dtype)


@dataclass(frozen=True)
class LayerLayout:
    """
    Attributes:
        nbytes: of the whole layer, without what every rank holds.
        part_nbytes: of a rank's part, by rank.
    """

    entries: tuple[Entry, ...]
    nbytes: int
    part_nbytes: tuple[int, ...]


def layer_layout(
    name: str, layer: nn.Module, plan: Mapping[str, str], size: int, kept: frozenset[int] = frozenset()
) -> LayerLayout:
    """
    Args:
        name: of the layer in the decoder, e.g. ``layers.3``.
        kept: ids of parameters that stay whole on every rank, as others use them too.
    """
    entries, at, part_at = [], 0, [0] * size
    for own_name, parameter in layer.named_parameters():
        cut = None if id(parameter) in kept else cut_of(parameter, style_of(plan, f"{name}.{own_name}"), size)
        if cut is None:
            continue
        shape, dtype = tuple(parameter.shape), parameter.dtype
        entries.append(Entry(own_name, shape, dtype, cut, at, tuple(part_at)))
        at += _aligned(_nbytes(shape, dtype))
        part_at = [had + _aligned(_nbytes(cut.shape(shape, rank), dtype)) for rank, had in enumerate(part_at)]
    return LayerLayout(tuple(entries), at, tuple(part_at))


def shared_parameters(layers: Sequence[nn.Module], model: nn.Module) -> frozenset[int]:
    """Ids of parameters that several layers use, or a layer and something else."""
    seen: dict[int, int] = {}
    for layer in layers:
        for parameter in layer.parameters():
            seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    inside = {id(module) for layer in layers for module in layer.modules()}
    outside = {
        id(parameter)
        for module in model.modules()
        if id(module) not in inside
        for parameter in module.parameters(recurse=False)
    }
    return frozenset(found for found, count in seen.items() if count > 1 or found in outside)


def owners(layer: nn.Module, layout: LayerLayout) -> Iterator[tuple[Entry, nn.Module, str]]:
    """Each entry with the module that has the parameter, and what that calls it."""
    for entry in layout.entries:
        owner, _, attribute = entry.name.rpartition(".")
        yield entry, layer.get_submodule(owner), attribute


def _view(memory: Tensor, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return memory[at : at + _nbytes(shape, dtype)].view(dtype).view(shape)


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
