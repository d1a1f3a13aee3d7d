"""An engine behind transformers' ``generate``: a causal LM with a forward, a config and a cache.

``generate`` runs transformers' own loop; each of its forwards is one of the engine's.
"""

# Shapes: B sequences of the caller's batch, C new columns, V vocabulary.
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from ds_ring.hf.cache import ShardedCache
from ds_ring.hf.generation_callbacks import SameChoice, SameScores
from ds_ring.hf.generation_settings import LEFT_OUT, without_left_out
from ds_ring.transport.base import Transport

Forward = Callable[[Tensor, Tensor | None, ShardedCache], Tensor]
"""(new ids [B, C], mask [B, all columns] or None, cache) -> logits [B, V] of the last column, alike on every rank."""


class GenerationAdapter(GenerationMixin):
    """Config, generation config and dtype are the model's; ``forward`` is the engine's."""

    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = False

    def __init__(
        self, model: PreTrainedModel, device: torch.device, forward: Forward, everyone: Transport, finite: Tensor
    ) -> None:
        """
        Args:
            everyone: all ranks that generate together.
            finite: a bool on the device. ``forward`` clears it where logits are not finite; generation then ends.
        """
        self._model, self._forward, self._everyone, self._finite = model, forward, everyone, finite
        self.config, self.generation_config = model.config, without_left_out(model.generation_config)
        self.device, self.dtype = device, model.dtype
        self.prefill_chunk_size: int | None = None
        """transformers' argument of the last ``generate``. Its own loop over chunks would not know of ranks."""
        self.agrees_on_choice = self.agrees_on_scores = False
        """Whether ranks take rank 0's tokens at each step, and its processed scores, rather than each its own."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: ShardedCache | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 1,
        return_dict: bool = True,
        tokenizer: object = None,  # of stop_strings; transformers hands it on to every forward
    ) -> CausalLMOutputWithPast:
        assert past_key_values is not None
        logits_BV = self._forward(input_ids, attention_mask, past_key_values)
        return CausalLMOutputWithPast(logits=logits_BV[:, None], past_key_values=past_key_values)

    __call__ = forward

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        given = None if generation_config is None else without_left_out(generation_config)
        kwargs = {name: value for name, value in kwargs.items() if name not in LEFT_OUT}
        settings, rest = super()._prepare_generation_config(given, **kwargs)
        self.prefill_chunk_size, settings.prefill_chunk_size = settings.prefill_chunk_size, None
        return settings, rest

    @classmethod
    def can_generate(cls) -> bool:
        return True

    def is_remote_code(self) -> bool:
        return False

    def get_experts_implementation(self) -> Any:
        return self._model.get_experts_implementation()

    def set_experts_implementation(self, implementation: Any) -> None:
        self._model.set_experts_implementation(implementation)

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        processors: LogitsProcessorList = super()._get_logits_processor(*args, **kwargs)
        if self.agrees_on_scores:
            processors.append(SameScores(self._everyone))
        return processors

    def _get_stopping_criteria(
        self, generation_config: GenerationConfig, stopping_criteria: StoppingCriteriaList | None, **kwargs: Any
    ) -> StoppingCriteriaList:
        criteria = super()._get_stopping_criteria(generation_config, stopping_criteria, **kwargs)
        criteria.append(_NotFinite(self._finite))
        return SameChoice(criteria, self._everyone) if self.agrees_on_choice else criteria


class _NotFinite(StoppingCriteria):
    """Ends all sequences where logits were not finite, without a wait for the device."""

    def __init__(self, finite: Tensor) -> None:
        self._finite = finite

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return ~self._finite.expand(len(input_ids))
