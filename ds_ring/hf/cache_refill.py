"""Whether a model's own ``generate`` fills its cache anew as a text grows, which transformers leaves to each model.

Phi-3, PhiMoE and Phi-4 do where LongRoPE goes over to its long frequencies: keys by both sets in one cache do not fit
together. Other models with LongRoPE go on with such keys, as does every model with dynamic NTK scaling.
"""

from __future__ import annotations

import torch
from transformers import GenerationMixin, PreTrainedModel


class _Held:
    """What a model asks of the cache that it is shown."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._tokens


def refills(model: PreTrainedModel, held: int, tokens: int) -> bool:
    """Whether ``model`` would drop a cache of the first ``held`` of a sequence's ``tokens`` and run all of them."""
    prepare = type(model).prepare_inputs_for_generation
    if held == 0 or prepare is GenerationMixin.prepare_inputs_for_generation:
        return False
    ids = torch.zeros(1, 1, dtype=torch.long).expand(1, tokens)
    inputs = prepare(model, ids, past_key_values=_Held(held), next_sequence_length=tokens - held)
    return inputs.get("past_key_values") is None
