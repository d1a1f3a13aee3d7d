"""A transformers model of a config, without weights: every field that no layer can have is found here."""

from __future__ import annotations

import copy

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ds_ring.errors import CheckpointError, UnsupportedModelError, in_one_line, is_out_of_memory
from ds_ring.utils.model_config import file_of

ATTENTION = None
"""What models are made with, whatever a config says: PyTorch's attention or, where a class has none, the plain one.
Both need no package and no kernel. ``hf.attention.inject`` puts ours in its place. It is not ours from the start, since
a model that takes no other is known by its keeping this one."""


def build(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The causal LM of ``config``, which stays as it is, on the device that the caller's context says.

    Raises:
        UnsupportedModelError: transformers has no causal LM of that kind.
        CheckpointError: a field of the config that no layer can have; names the file, where it is of one, and
            transformers' reason.
    """
    try:
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise UnsupportedModelError(f"transformers makes no causal LM of this {type(config).__name__}")
        given = {} if dtype is None else {"dtype": dtype}
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), attn_implementation=ATTENTION, trust_remote_code=False, **given
        )
    except UnsupportedModelError:
        raise
    except Exception as error:  # values that no layer can have end in errors of any kind
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{file_of(config)}: transformers makes no causal LM of this {type(config).__name__}: {in_one_line(error)}"
        ) from None
    return model.eval()
