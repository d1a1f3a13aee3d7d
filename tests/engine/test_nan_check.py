"""NaN and infinity never leave an engine as a result: they are refused, with the layer and ranks they began on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ds_ring.engine.engine import Engine
from ds_ring.errors import NumericsError
from tests.helpers.mocked_world import outcome, serve
from tests.helpers.tiny_models import ARCHITECTURES, build, tokens

LAYERS = 3


def spoil(engine: Engine, layer: int, value: float, rank: int | None = None) -> None:
    """Make one of the model's layers give ``value`` for one token, on one rank or on all."""
    if layer not in engine.runner.layers or rank not in (None, engine.mesh.rank):
        return

    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        first = out if isinstance(out, torch.Tensor) else out[0]
        first[0, 0, 0] = value
        return out

    engine.model.get_submodule("gpt_neox.layers")[engine.runner.layers.index(layer)].register_forward_hook(hook)


def refusals(work, **layout) -> list[str]:
    model = build(ARCHITECTURES["gpt_neox"]())
    assert model.config.num_hidden_layers == LAYERS
    errors = serve(model, lambda engine: outcome(lambda: work(engine)), **layout)
    assert all(isinstance(error, NumericsError) for error in errors)
    return [str(error) for error in errors]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", [{"ring_degree": 2}, {"pp_size": 2}, {"dp_size": 2}], ids=str)
@pytest.mark.parametrize("call", ["logits", "scores"])
def test_all_ranks_refuse_and_name_the_layer(call, layout, value):
    def work(engine: Engine) -> object:
        spoil(engine, layer=2, value=value)
        return engine(tokens(2, 33)) if call == "logits" else engine.token_log_likelihoods(tokens(2, 33))

    ranks = "1" if "pp_size" in layout else "0, 1"
    for text in refusals(work, batch_size=2, **layout):
        assert f"layer 2 of 3 gave NaN or infinity, on rank {ranks};" in text


def test_the_rank_it_began_on_is_named_though_it_spreads_to_all():
    def work(engine: Engine) -> object:
        spoil(engine, layer=1, value=float("nan"), rank=2)
        return engine(tokens(1, 33), logits_to_keep=1)

    for text in refusals(work, ring_degree=3):
        assert "layer 1 of 3 gave NaN or infinity, on rank 2;" in text


def test_a_spoilt_head_is_told_from_spoilt_layers():
    def work(engine: Engine) -> object:
        engine.model.get_output_embeddings().weight.data[0, 0] = float("nan")
        return engine(tokens(1, 33))

    for text in refusals(work, ulysses_degree=2):
        assert text == "the model gave NaN or infinity behind its last layer (3 layers are finite)"
