"""Rotary frequencies that depend on a sequence's length, where a call of the model has only a part of the sequence.

Two of transformers' kinds of RoPE choose their frequencies in every call, by the highest position of that call:
"longrope" (Phi-3, Phi-4, PhiMoE: one set up to ``original_max_position_embeddings``, another beyond) and "dynamic" (NTK
scaling: a set for every length beyond ``max_position_embeddings``). A call here has the tokens of one rank, of one
chunk of a prompt, or of several sequences of unequal lengths. So the rotary modules of such a model are given the
length of each whole sequence, and what transformers would make of the sequence alone is what every rank, chunk and step
gets.
"""

# Shapes: b sequences of a call, T tokens of each.
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from transformers import PreTrainedModel

from ds_ring.errors import DsRingError

LONGROPE, DYNAMIC = "longrope", "dynamic"

Lengths = Callable[[], Sequence[int]]
"""() -> the length of each whole sequence of a call; called only where lengths matter."""
Regime = tuple[int, ...]
"""What of a length decides the frequencies."""


def compute_on_host(model: PreTrainedModel) -> None:
    """Let the rotary modules of a model on the meta device that compare lengths compute on the CPU, where there are
    lengths, and give results on the meta device."""
    for module in model.modules():
        if _length_dependent(module):
            with torch.device("cpu"):
                real = type(module)(module.config)
            module.forward = _OnHost(real)


class _OnHost:
    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        own, positions = x.new_empty(0, device="cpu"), torch.zeros_like(position_ids, device="cpu")
        out = self._module(own, positions, *args, **kwargs)
        return tuple(t.to("meta") for t in out) if isinstance(out, tuple) else out.to("meta")


class RopeLengths:
    """The rotary modules of one model, and the lengths of the sequences that its current call has parts of.

    A model whose frequencies are the same at every length is left as it is.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._lengths: WeakKeyDictionary[greenlet, tuple[int, ...]] = WeakKeyDictionary()
        switches, scaled_beyond = set(), set()
        for module in model.modules():
            found = _length_dependent(module)
            switches |= {_switch(module, layer_type) for layer_type, kind in found if kind == LONGROPE}
            scaled_beyond |= {int(module.original_max_seq_len) for _, kind in found if kind != LONGROPE}
            if found:
                module.forward = _Whole(module, self)
        self._switches, self._scaled_beyond = sorted(switches), sorted(scaled_beyond)

    @property
    def matter(self) -> bool:
        """Whether the frequencies depend on the length at all."""
        return bool(self._switches or self._scaled_beyond)

    def regime(self, length: int) -> Regime:
        """Equal for lengths with the same frequencies."""
        return (*(int(length > at) for at in self._switches), *(max(length, at) for at in self._scaled_beyond))

    @contextmanager
    def of(self, lengths: Lengths) -> Iterator[None]:
        """Inside the block this lane calls the model with parts of sequences of these lengths."""
        lane = getcurrent()
        if self.matter:
            self._lengths[lane] = tuple(lengths())
        try:
            yield
        finally:
            self._lengths.pop(lane, None)

    @property
    def now(self) -> tuple[int, ...]:
        """
        Raises:
            DsRingError: outside ``of``.
        """
        if (lengths := self._lengths.get(getcurrent())) is None:
            raise DsRingError("call the engine, not the model inside it: the model alone holds a part of the sequence")
        return lengths


class _Whole:
    """The forward of a rotary module: cos and sin of b sequences' parts by the frequencies of each whole sequence.

    The module's own forward is told a sequence's length by one more position, the sequence's last one.
    """

    def __init__(self, module: nn.Module, lengths: RopeLengths) -> None:
        self._module, self._own, self._lengths = module, module.forward, lengths

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths = self._lengths.now
        if position_ids.shape[-2] != len(lengths):
            raise DsRingError(f"positions of {position_ids.shape[-2]} sequences for {len(lengths)} lengths")
        parts, start = [], 0
        # Sequences beside each other, since a slice can be captured in a CUDA graph and an index cannot.
        for _, same in groupby(lengths, self._lengths.regime):
            length, count = max(group := list(same)), len(group)
            positions = position_ids[..., start : start + count, :]
            last = positions.new_full((*positions.shape[:-1], 1), length - 1)
            _forget(self._module)
            parts.append(self._own(x, torch.cat((positions, last), -1), *args, **kwargs))
            start += count
        return _without_last(parts)


def _without_last(parts: list[Any]) -> Any:
    """The results of all sequences, [..., b, T, *], of parts with one position too many."""
    if isinstance(parts[0], tuple):
        return tuple(_without_last(list(tensors)) for tensors in zip(*parts, strict=True))
    return torch.cat([part[..., :-1, :] for part in parts], -3)


def _forget(module: nn.Module) -> None:
    """Undo what earlier calls left in a rotary module: transformers goes back from the frequencies of a long text to
    those of a shorter one only if the latter is below ``max_position_embeddings``."""
    for layer_type, kind in _length_dependent(module):
        if kind != LONGROPE:
            prefix = f"{layer_type}_" if layer_type else ""
            setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq"))
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _length_dependent(module: nn.Module) -> list[tuple[str, str]]:
    """(type of layer, kind of RoPE) of a rotary module where the kind depends on the length. The first is empty where
    the module has one kind for all layers. Empty for any other module."""
    kinds = getattr(module, "rope_type", None)
    by_layer_type = kinds if isinstance(kinds, dict) else {"": kinds}
    return [(t, k) for t, k in by_layer_type.items() if isinstance(k, str) and (k == LONGROPE or DYNAMIC in k)]


def _switch(module: nn.Module, layer_type: str) -> int:
    """The greatest length with LongRoPE's short frequencies."""
    config: Any = module.config
    parameters = config.rope_parameters[layer_type] if layer_type else config.rope_parameters
    return int(parameters["original_max_position_embeddings"])
