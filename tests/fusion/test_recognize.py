"""Activations, norms and rotary functions are recognised by their results, not by their names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.gpt_neox import modeling_gpt_neox

from ds_ring.fusion import rotary
from ds_ring.fusion.fuse import Fusion
from ds_ring.fusion.recognize import Norm, activation_of
from ds_ring.hf.decoder import Decoder
from tests.helpers.tiny_models import (
    build,
    gemma2,
    gpt_neox,
    llama_gqa,
    logits,
    tokens,
)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu_fast", "gelu_tanh"),
        ("gelu_accurate", "gelu_tanh"), ("gelu", "gelu"), ("gelu_python", "gelu"), ("silu", "silu"), ("relu", "relu"),
        ("quick_gelu", None), ("gelu_10", None), ("relu6", None), ("tanh", None), ("linear", None), ("mish", None),
    ],
)  # fmt: skip
def test_activations_are_recognised_by_their_results(name, kind):
    assert activation_of(ACT2FN[name]) == kind


def test_the_exact_gelu_is_not_replaced_by_its_approximation():
    model = build(gpt_neox(heads=4, layers=2, hidden_act="gelu"))
    fusion = Fusion(Decoder.of(model))
    logits(model, tokens(1, 5))
    assert fusion.done["LinearGelu"] == 0
    assert fusion.done["AddNorm"] == 2


def test_norms_are_recognised_by_their_results():
    def of(config: Any) -> Norm | None:
        layer = Decoder.of(build(config)).layers[0]
        return Norm.of(layer.input_layernorm)

    specs = [of(config) for config in (gpt_neox(), llama_gqa(rms_norm_eps=1e-3), gemma2())]
    assert [(n.spec.centred, n.spec.offset) for n in specs if n] == [(True, 0.0), (False, 0.0), (False, 1.0)]
    assert specs[1] is not None
    assert specs[1].spec.eps == 1e-3
    assert Norm.of(nn.GroupNorm(2, 8)) is None
    assert Norm.of(nn.Linear(8, 8)) is None


def test_rotary_functions_are_recognised_by_their_results():
    def neighbours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        def quarter(x: Tensor) -> Tensor:
            return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)

        return q * cos[:, None] + quarter(q) * sin[:, None], k * cos[:, None] + quarter(k) * sin[:, None]

    assert rotary.rotates_by_halves(modeling_gpt_neox.apply_rotary_pos_emb)
    assert not rotary.rotates_by_halves(neighbours)
