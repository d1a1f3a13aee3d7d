"""A transformers model as one pipeline stage: cut down to some of its layers, and fed with hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from greenlet import getcurrent
from torch import Tensor, nn

from ds_ring.hf.decoder import Decoder


class _NoEmbedding(nn.Module):
    """Stands for embeddings that belong to the first stage. Its result is zero: models may add it to something."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(())


def strip(decoder: Decoder, layers: range, keep_embedding: bool = False) -> None:
    """Replace what belongs to other stages by modules without parameters; layers keep their numbers.

    These are the other stages' layers; the embeddings, except on the first stage; the last norm and the head, except on
    the last stage.
    """
    module, count = decoder.module, len(decoder.layers)
    for i in range(count):
        if i not in layers:
            decoder.layers[i] = nn.Identity()
    if layers.start > 0 and not keep_embedding:
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Embedding):
                setattr(module, name, _NoEmbedding())
    if layers.stop < count:
        for name, child in list(module.named_children()):
            if "Norm" in type(child).__name__:
                setattr(module, name, nn.Identity())
        decoder.model.set_output_embeddings(nn.Identity())


def keep_stage(decoder: Decoder, layers: range) -> None:
    """Cut the model down to the stage of ``layers``.

    The config is cut as well, since models index it by the number of a layer in their loop.
    """
    strip(decoder, layers)
    text_config = decoder.model.config.get_text_config()
    setattr(decoder.module, decoder.layers_name, nn.ModuleList(decoder.layers[i] for i in layers))
    text_config.num_hidden_layers = len(layers)
    if getattr(text_config, "layer_types", None):
        text_config.layer_types = [text_config.layer_types[i] for i in layers]


@contextmanager
def spliced(decoder: Decoder, hidden_in: Tensor | None) -> Iterator[list[Tensor]]:
    """Inside the block a forward starts its layers from ``hidden_in`` (None: from the model's own embedding).

    The list yielded receives the hidden states after the stage's last layer. ``hidden_in`` is put in at the first
    layer, not as ``inputs_embeds``, so that what models do before their layers is not done again: scaling, position
    embeddings, norms.
    """
    found: list[Tensor] = []
    own = getcurrent()  # another lane may run another micro-batch

    def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": hidden_in}
        return (hidden_in, *args[1:]), kwargs

    def collect(module: nn.Module, args: Any, out: Any) -> None:
        if getcurrent() is own:
            found.append(out if isinstance(out, Tensor) else out[0])

    handles = [decoder.layers[-1].register_forward_hook(collect)]
    if hidden_in is not None:
        first = decoder.layers[0]
        handles.append(first.register_forward_pre_hook(replace, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
