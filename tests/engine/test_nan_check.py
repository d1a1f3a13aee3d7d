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
        return engine(tokens(2, 33)) if call == "logits" else engine.score(tokens(2, 33)).log_probs

    ranks = "1" if "pp_size" in layout else "0, 1"
    for text in refusals(work, batch_size=2, **layout):
        assert f"layer 2 of 3 gave NaN or infinity, on rank {ranks};" in text


def test_the_rank_it_began_on_is_named_though_it_spreads_to_all():
    def work(engine: Engine) -> object:
        spoil(engine, layer=1, value=float("nan"), rank=2)
        return engine(tokens(1, 33), logits_to_keep=1)

    for text in refusals(work, ring_degree=3):
        assert "layer 1 of 3 gave NaN or infinity, on rank 2;" in text


CALLS = {
    "logits": lambda engine, ids: engine(ids),
    "scores": lambda engine, ids: engine.score(ids).log_probs,
    "next_token_logits": lambda engine, ids: engine.next_token_logits(ids),
    "generate": lambda engine, ids: engine.generate(ids, max_new_tokens=3, do_sample=False),
}
CHECK = "check the weights, or, if activations overflow fp16, take dtype bf16 or fp32"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", [{"ulysses_degree": 2}, {"pp_size": 2}, {"dp_size": 2}], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_a_spoilt_head_is_told_from_spoilt_layers(call, layout, value):
    """Hidden states are finite then, and only what is made of them is not."""

    def work(engine: Engine) -> object:
        head = engine.model.get_output_embeddings()
        if isinstance(head, nn.Linear):  # the last stage of a pipeline has it
            head.weight.data[0, 0] = value
        return CALLS[call](engine, tokens(2, 33))

    # Where only the last token's logits are made, the rank that holds it makes them.
    alone = "pp_size" in layout or (call == "generate" and "ulysses_degree" in layout)
    for text in refusals(work, batch_size=2, **layout):
        ranks = "1" if alone else "0, 1"
        assert text == f"the head gave NaN or infinity, on rank {ranks}, behind 3 layers that are finite; {CHECK}"


def test_the_last_norm_is_named():
    def work(engine: Engine) -> object:
        if engine.mesh.rank == 1:
            engine.model.get_submodule("gpt_neox.final_layer_norm").weight.data[0] = float("nan")
        return engine.score(tokens(1, 33)).log_probs

    for text in refusals(work, ring_degree=2):
        assert text == f"the last norm gave NaN or infinity, on rank 1, behind 3 layers that are finite; {CHECK}"


def test_what_does_not_come_again_is_said_too():
    def work(engine: Engine) -> object:
        calls = []

        def once(module: nn.Module, args: Any, out: Any) -> Any:
            calls.append(0)
            return out * float("nan") if len(calls) == 1 else out

        engine.model.get_output_embeddings().register_forward_hook(once)
        return engine(tokens(1, 33))

    for text in refusals(work, ring_degree=2):
        assert text == "the model gave NaN or infinity, though none of its 3 layers, nor its head, when run again"
