"""What tests of ``generate`` share: layouts, prompts, and transformers' own generation to hold it against."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

from tests.helpers.mocked_world import relative_error
from tests.helpers.tiny_models import shared
from tests.helpers.tiny_models import tokens as any_tokens

PROMPT = 37
TOLERANCE = 1e-5
"""On the relative error of a step's logits, fp32."""
SAFE_MARGIN = 2e-4
"""Least distance of the best two logits at which a greedy token counts: ten times what rounding moves a logit of these
models (2e-5 at most), so that no token is a toss-up. Every reference here is asserted to keep it."""

GREEDY: dict[str, Any] = {
    "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True,
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {},
    "ring3": {"ring_degree": 3},
    "ring2_contiguous_pass_kv": {"ring_degree": 2, "ring_impl": "contiguous", "ring_variant": "pass_kv"},
    "ulysses3": {"ulysses_degree": 3},
    "ulysses3_ring2": {"ulysses_degree": 3, "ring_degree": 2},
    "pp2": {"pp_size": 2},
    "tp3_pp2": {"tp_size": 3, "pp_size": 2},
    "dp2_ring2": {"dp_size": 2, "ring_degree": 2},
    "dp2_tp3": {"dp_size": 2, "tp_size": 3},
}


def by_name(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("layout", [LAYOUTS[name] for name in names], ids=names)


def tokens(sequences: int, length: int, seed: int = 0) -> Tensor:
    """Without token 0, which pads: transformers would leave it out where no mask is given."""
    return any_tokens(sequences, length, seed).clamp(min=1)


def llama() -> PreTrainedModel:
    """Nine query heads over three key/value heads."""
    return shared("llama_gqa")


_UNSHARDED: WeakKeyDictionary[PreTrainedModel, dict[str, GenerateDecoderOnlyOutput]] = WeakKeyDictionary()


def unsharded(model: PreTrainedModel, ids: Tensor, **options: Any) -> GenerateDecoderOnlyOutput:
    """What transformers' own ``generate`` gives, computed once for all layouts that are held against it."""
    asked = [value.flatten().tolist() if isinstance(value, Tensor) else value for value in options.values()]
    if options.get("do_sample") or not all(isinstance(value, int | float | str | list | None) for value in asked):
        return _generated(model, ids, **options)  # a random state, or an object's, is not told by its name
    found = _UNSHARDED.setdefault(model, {})
    key = repr((list(ids.shape), ids.flatten().tolist(), list(options), asked))
    if key not in found:
        found[key] = _generated(model, ids, **options)
    return found[key]


def _generated(model: PreTrainedModel, ids: Tensor, **options: Any) -> GenerateDecoderOnlyOutput:
    with torch.no_grad():
        found = model.generate(ids, **GREEDY | {"attention_mask": torch.ones_like(ids)} | options)
    best_two = torch.stack(found.logits).topk(2).values
    assert (best_two[..., 0] - best_two[..., 1]).min() > SAFE_MARGIN
    return found


def assert_same(got: GenerateDecoderOnlyOutput, want: GenerateDecoderOnlyOutput) -> None:
    assert torch.equal(got.sequences, want.sequences)
    for step, (own, other) in enumerate(zip(got.logits, want.logits, strict=True)):
        assert relative_error(own, other) < TOLERANCE, step


def on_all_ranks_alike(results: list[GenerateDecoderOnlyOutput]) -> GenerateDecoderOnlyOutput:
    for other in results[1:]:
        assert torch.equal(other.sequences, results[0].sequences)
        assert all(torch.equal(a, b) for a, b in zip(other.logits, results[0].logits, strict=True))
    return results[0]


def padded(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Left-padded ids and mask; under padding stand tokens that must not count."""
    ids, mask = tokens(len(lengths), max(lengths)), torch.ones(len(lengths), max(lengths), dtype=torch.long)
    for sequence, n in enumerate(lengths):
        mask[sequence, : max(lengths) - n] = 0
    return ids, mask


def assert_as_alone(model: PreTrainedModel, ids: Tensor, mask: Tensor, got: GenerateDecoderOnlyOutput) -> None:
    new = len(got.logits)
    for sequence in range(len(ids)):
        alone = unsharded(model, ids[sequence : sequence + 1, mask[sequence].bool()], max_new_tokens=new)
        assert torch.equal(got.sequences[sequence, -new:], alone.sequences[0, -new:])
        for own, other in zip(got.logits, alone.logits, strict=True):
            assert relative_error(own[sequence], other[0]) < TOLERANCE


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True
