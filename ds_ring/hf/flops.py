"""The number of weights that every token is multiplied with."""

from accelerate import init_empty_weights
from torch import nn
from transformers import PretrainedConfig

from ds_ring.hf.build import build
from ds_ring.hf.decoder import Decoder


def linear_parameters(config: PretrainedConfig) -> int:
    """Elements of all matrices in the decoder layers, without the embedding and the head.

    Mixture-of-experts layers are counted whole, though a token uses only some of the experts.
    """
    return sum(layer_parameters(config))


def layer_parameters(config: PretrainedConfig) -> list[int]:
    """As ``linear_parameters``, layer by layer, from the model on the meta device."""
    with init_empty_weights():
        model = build(config)
    return [matrix_elements(layer) for layer in Decoder.of(model).layers]


def matrix_elements(layer: nn.Module) -> int:
    """Elements of a layer's matrices; of a sharded layer, those on this rank."""
    return sum(p.numel() for p in layer.parameters() if p.dim() >= 2)
