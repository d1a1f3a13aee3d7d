"""A pass that ends in an error leaves layers on their way; the next pass gives what it always does."""

import pytest
import torch

from tests.helpers.mocked_world import outcome, serve
from tests.helpers.tiny_models import build, llama_gqa, tokens


def fail(*args):
    raise ArithmeticError("in the middle")


@pytest.mark.parametrize("wire", ["threads", "copy_engine"])
@pytest.mark.parametrize("at", [0, 2, 3, 4])
def test_an_error_in_a_layer_on_all_ranks(at, wire):
    model, ids = build(llama_gqa(num_hidden_layers=5)), tokens(2, 21)

    def work(engine):
        hook = engine.runner.decoder.layers[at].register_forward_pre_hook(fail)
        error = outcome(lambda: engine(ids))
        hook.remove()
        return str(error), engine(ids).logits

    layout = {"ring_degree": 2, "micro_batch_size": 1, "wire": wire}
    for (said, got), (_, want) in zip(
        serve(model, work, weights="sharded", **layout), serve(model, work, **layout), strict=True
    ):
        assert said == "in the middle"
        assert (got - want).abs().max() <= 1e-6 * want.abs().max()


def test_a_layer_that_did_not_come_is_fetched_again():
    model, ids = build(llama_gqa(num_hidden_layers=5)), tokens(2, 21)

    def work(engine):
        parts = engine.runner.weights.parts
        start = parts.start
        parts.start = lambda layer, target: fail() if layer == 2 else start(layer, target)
        error = outcome(lambda: engine(ids))
        parts.start = start
        return str(error), engine(ids).logits

    [(said, got)] = serve(model, work, weights="streamed")
    assert said == "in the middle"
    [want] = serve(model, lambda engine: engine(ids).logits)
    assert torch.equal(got, want)
