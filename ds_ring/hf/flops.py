"""Counting the weights that every token is multiplied with."""

from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PretrainedConfig

from ds_ring.hf.anatomy import Anatomy


def linear_parameters(config: PretrainedConfig) -> int:
    """Elements of all matrices in the decoder layers (no embedding, no head), from the model on the meta device.

    Mixture-of-experts layers would be counted whole, though a token meets only some experts.
    """
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in Anatomy.of(model).layers.parameters() if p.dim() >= 2)
