"""What ``generate`` refuses, on every rank and by name, and numbers that go wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from ds_ring.engine.engine import Engine
from ds_ring.errors import DisagreementError, DsRingError, InputError, NumericsError
from tests.helpers.generation import GREEDY, Heard, llama, tokens
from tests.helpers.mocked_world import outcome, serve
from tests.helpers.tiny_models import build, gpt2, llama_gqa

LIMITED = {"max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("ids", "mask", "options", "words"),
    [
        (torch.ones(1, 0).long(), None, {}, "at least one of each, not (1, 0)"),
        (torch.ones(1, 40).long(), None, {"max_length": 40}, "nothing to generate"),
        (torch.ones(1, 40).long(), None, {"max_length": 20}, "nothing to generate"),
        (torch.ones(1, 40).long(), None, {"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number of at"),
        (torch.ones(1, 4).long(), torch.tensor([[1, 1, 1, 0]]), {}, "row 0 of the batch ends in padding"),
        (torch.ones(1, 4).long(), torch.ones(1, 5).long(), {}, "attention_mask has 5 columns, input_ids 4"),
        (torch.ones(1, 4).long() * 97, None, {}, "token id 97 is outside the vocabulary of 97"),
        (torch.ones(1, 4).long(), None, {"num_beams": 2}, "does not serve beam_search (num_beams=2)"),
        (torch.ones(1, 4).long(), None, {"prompt_lookup_num_tokens": 2}, "does not serve prompt_lookup_num_tokens"),
        (torch.ones(1, 4).long(), None, {"assistant_model": "any"}, "does not serve assistant_model"),
        (torch.ones(1, 4).long(), None, {"position_ids": torch.arange(4)[None]}, "does not serve position_ids"),
        (torch.ones(1, 4).long(), None, {"inputs_embeds": torch.ones(1, 4, 72)}, "does not serve inputs_embeds"),
        (torch.ones(1, 4).long(), None, {"token_type_ids": torch.ones(1, 4)}, "does not serve token_type_ids"),
        (torch.ones(1, 4).long(), None, {"use_cache": False}, "use_cache=False"),
        (torch.ones(1, 4).long(), None, {"prefill_chunk_size": 0}, "prefill_chunk_size=0 must be"),
        (torch.ones(1, 4).long(), None, {"past_key_values": DynamicCache()}, "a DynamicCache that another model made"),
    ],
    ids=lambda value: None if isinstance(value, Tensor) else str(value)[:20],
)  # fmt: skip
@pytest.mark.parametrize("layout", [{"ring_degree": 2}, {"pp_size": 2}], ids=str)
def test_what_cannot_work_is_refused_by_name_on_every_rank(layout, ids, mask, options, words):
    model = build(llama_gqa(**LIMITED))
    errors = serve(
        model, lambda engine: outcome(lambda: engine.generate(ids, mask, **options)), max_length=64, **layout
    )
    for error in errors:
        assert isinstance(error, InputError)
        assert words in str(error)


RING_64 = {"ring_degree": 2, "max_length": 64}


def test_more_tokens_than_learned_positions_are_refused():
    model, ids = build(gpt2(n_positions=64)), torch.ones(1, 40).long()
    words = "40 tokens of input + max_new_tokens=25 exceed the model's max_position_embeddings=64; shorten either"
    for error in serve(model, lambda engine: outcome(lambda: engine.generate(ids, max_new_tokens=25)), **RING_64):
        assert isinstance(error, InputError)
        assert words in str(error)


def test_ranks_that_were_given_different_things_say_so():
    def work(engine: Engine) -> list[Exception | None]:
        rank = engine.mesh.rank
        return [
            outcome(lambda: engine.generate(tokens(1, 20, seed=rank), max_new_tokens=2)),
            outcome(lambda: engine.generate(tokens(1, 20), max_new_tokens=2 + rank)),
            outcome(lambda: engine.generate(tokens(1, 20), max_new_tokens=2, num_beams=1 + rank)),
            outcome(lambda: engine.generate(tokens(1, 19), **({"max_length": 20} if rank else {}))),
        ]

    for ids, length, beams, default in serve(llama(), work, ring_degree=2):
        assert isinstance(ids, DisagreementError)
        assert "input_ids" in str(ids)
        assert "generate's max_new_tokens: rank 0 has 2, rank 1 has 3" in str(length)
        assert isinstance(beams, DsRingError)
        assert "generate's max_new_tokens: rank 0 has 20, rank 1 has 1" in str(default)


def test_more_replicas_than_rows_are_refused():
    (error, *_) = serve(
        llama(), lambda engine: outcome(lambda: engine.generate(tokens(1, 20))), dp_size=2, batch_size=2
    )
    assert "dp_size=2" in str(error)


@pytest.mark.parametrize("layout", [{"ring_degree": 2}, {"pp_size": 2}], ids=str)
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("when", "told"), [("prompt", 20), ("decoding", 21)])
def test_nan_is_traced_before_a_token_is_told(when, told, sampled, layout):
    def work(engine: Engine) -> tuple[Exception | None, list[int]]:
        def spoil(module: object, args: object, out: Any) -> Any:
            hidden = out if isinstance(out, Tensor) else out[0]
            if when == "prompt" or hidden.shape[1] == 1:
                hidden.mul_(torch.nan)

        if 1 in engine.runner.layers:
            engine.runner.decoder.layers[engine.runner.layers.index(1)].register_forward_hook(spoil)
        heard = Heard()
        options = GREEDY | {"do_sample": sampled, "max_new_tokens": 5, "streamer": heard}
        return outcome(lambda: engine.generate(tokens(1, 20), **options)), heard.tokens

    results = serve(llama(), work, **layout)
    assert len(results[0][1]) == told
    for error, _ in results:
        assert isinstance(error, NumericsError)
        ranks = "0" if "pp_size" in layout else "0, 1"
        assert f"layer 1 of 3 gave NaN or infinity, on rank {ranks};" in str(error)
