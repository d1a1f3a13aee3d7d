"""The parts of a transformers decoder, found by its structure and not by a table of model names."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from ds_ring.errors import UnsupportedModelError


@dataclass(frozen=True)
class Decoder:
    """The module of a causal LM that loops over the layers, and how it is reached.

    Attributes:
        parent, name: ``module`` is the attribute ``name`` of ``parent``.
        layers_name: what ``module`` calls its list of layers.
    """

    model: PreTrainedModel
    parent: nn.Module
    name: str
    layers_name: str

    @classmethod
    def of(cls, model: PreTrainedModel) -> Decoder:
        """
        Raises:
            UnsupportedModelError: no module has a list of as many layers as the config says.
        """
        text_config: Any = model.config.get_text_config()
        count = text_config.num_hidden_layers
        found = [
            (module, cls(model, parent, name, layers_name))
            for parent in model.modules()
            for name, module in parent.named_children()
            for layers_name, layers in module.named_children()
            if isinstance(layers, nn.ModuleList) and len(layers) == count
        ]
        if not found:
            raise UnsupportedModelError(f"{type(model).__name__} has no list of {count} decoder layers")
        named = model.get_decoder()
        for module, decoder in found:
            if module is named:
                return decoder
        # Not all classes have get_decoder(), and an encoder of images may have as many layers.
        for_text = [decoder for module, decoder in found if getattr(module, "config", None) is text_config]
        return (for_text or [decoder for _, decoder in found])[0]

    @property
    def module(self) -> nn.Module:
        """Embeds tokens, runs the layers, applies the last norm; returns ``last_hidden_state``."""
        return getattr(self.parent, self.name)

    @property
    def layers(self) -> nn.ModuleList:
        layers = getattr(self.module, self.layers_name)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @contextmanager
    def captured_hidden(self) -> Iterator[list[Tensor]]:
        """The list yielded receives the ``last_hidden_state`` of every forward of this lane inside the block."""
        found: list[Tensor] = []
        own = getcurrent()

        def keep(module: nn.Module, args: Any, out: Any) -> None:
            if getcurrent() is own:
                found.append(out[0])

        handle = self.module.register_forward_hook(keep)
        try:
            yield found
        finally:
            handle.remove()

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Inside the block the model is its head alone: ``inputs_embeds`` are taken as the decoder's output.

        So each architecture's own code computes logits from hidden states, scaling and soft-capping included. Of a
        model of several parts the decoder is inside a module that would embed images; that one is left out as a whole.
        """
        name, outer = next((n, child) for n, child in self.model.named_children() if self.module in child.modules())
        bypass = inner = _Bypass()
        for part in filter(None, next(n for n, child in outer.named_modules() if child is self.module).split(".")):
            # OPT calls its decoder inside the outer module itself.
            setattr(inner, part, _Bypass())
            inner = getattr(inner, part)
        setattr(self.model, name, bypass)
        try:
            yield
        finally:
            setattr(self.model, name, outer)


class _HiddenStates(BaseModelOutputWithPast):
    """What else a model's own decoder gives, such as router logits, is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class _Bypass(nn.Module):
    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutputWithPast:
        return _HiddenStates(last_hidden_state=inputs_embeds)


def own_configs(model: PreTrainedModel) -> None:
    """Give ``model`` its own copy of its config, which an engine changes.

    transformers lets models that were built from one config object share it.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PretrainedConfig):
                setattr(module, name, copy.deepcopy(value, memo))


def head_logits(decoder: Decoder, hidden: Tensor) -> Tensor:
    """Logits [B, L, V] of final hidden states [B, L, d]."""
    with decoder.bypassed():
        logits = decoder.model(inputs_embeds=hidden, use_cache=False).logits
    assert isinstance(logits, torch.Tensor)
    return logits
