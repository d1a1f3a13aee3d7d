"""Weights from safetensors into a model layer by layer, for whoever keeps only a part of each layer."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ds_ring.hf.checkpoint import Checkpoint
from ds_ring.hf.generation_settings import read_generation_config
from ds_ring.hf.loading import convert, without_weights
from ds_ring.hf.tensor_fit import refuse_unfit
from ds_ring.utils.model_config import read_config

_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")
KEPT = "_ds_ring_kept"
"""Attribute of parameters of a layer that has been taken over: these stay."""


class LayerLoader:
    """
    Attributes:
        model: with its weights on ``device`` but for those of its layers, which are on the meta device.
    """

    def __init__(self, path: str | Path, dtype: torch.dtype, device: torch.device) -> None:
        """
        Raises:
            CheckpointError: weights that do not fit the model.
        """
        self._path, self._dtype, self._device = path, dtype, device
        checkpoint, config = Checkpoint.open(path), read_config(path)
        self._decoder, tied = without_weights(config, dtype, range(config.get_text_config().num_hidden_layers))
        self.model: PreTrainedModel = self._decoder.model
        layers = self._decoder.layers
        self._prefix = next(f"{name}." for name, module in self.model.named_modules() if module is layers)
        self._tensors: dict[int | None, dict[str, Any]] = defaultdict(dict)
        for name, tensor in checkpoint.lazy_tensors().items():
            self._tensors[_first_number(name)][name] = tensor
        self._load(None, {name for name in _names(self.model) if not name.startswith(self._prefix)}, tied)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
        self.model.generation_config = read_generation_config(checkpoint.directory)
        self.model.eval()

    def fill(self, number: int) -> None:
        """Give layer ``number`` its weights, on the device.

        Raises:
            CheckpointError: as the constructor.
        """
        prefix = f"{self._prefix}{number}."
        self._load(number, {name for name in _names(self.model) if name.startswith(prefix)})

    def _load(self, group: int | None, wanted: set[str], tied: bool = False) -> None:
        mismatched: list[Any] = []
        # By its first number a name says whose layer it is of, but where the model has other layers too.
        for candidate in [group, *(other for other in self._tensors if other != group)]:
            with self._kept():
                mismatched += convert(self.model, self._tensors[candidate], self._dtype, self._device)
            if tied:
                self.model.tie_weights()
            self._forget_others(wanted)
            if not (missing := self._missing(wanted)):
                break
        refuse_unfit(self._path, missing, [found for found in mismatched if found[0] in wanted])

    def _missing(self, wanted: set[str]) -> list[str]:
        return [name for name, parameter in self.model.named_parameters() if parameter.is_meta and name in wanted]

    def _forget_others(self, wanted: set[str]) -> None:
        """Weights of layers that are not wanted now, and came along."""
        for number, layer in enumerate(self._decoder.layers):
            if any(name.startswith(f"{self._prefix}{number}.") for name in wanted):
                continue
            for module in layer.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None and not parameter.is_meta and not hasattr(parameter, KEPT):
                        module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Inside the block parameters that were taken over may be replaced; behind it they are there again."""
        kept = [
            (module, name, parameter)
            for module in self._decoder.layers.modules()
            for name, parameter in module._parameters.items()
            if hasattr(parameter, KEPT)
        ]
        try:
            yield
        finally:
            for module, name, parameter in kept:
                module._parameters[name] = parameter


def _names(model: nn.Module) -> Iterable[str]:
    return [name for name, _ in model.named_parameters()]


def _first_number(name: str) -> int | None:
    found = _NUMBER.search(name)
    return int(found[1]) if found else None
