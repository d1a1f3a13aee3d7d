"""How many positions a model has, and how many it was made for."""

from __future__ import annotations

import logging

import pytest
import torch

from ds_ring.hf.dims import model_dims
from ds_ring.planning import validation
from ds_ring.planning.validation import check_positions
from tests.helpers.generation import GREEDY, assert_same, unsharded
from tests.helpers.mocked_world import relative_error, serve
from tests.helpers.rope_models import longrope
from tests.helpers.tiny_models import build, gemma3, gpt2, llama_gqa, logits, opt, tokens

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
DYNAMIC = LINEAR | {"rope_type": "dynamic"}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("config", "positions", "intended"),
    [
        (gpt2(n_positions=64), 64, 64),
        (opt(max_position_embeddings=64), 64, 64),
        (llama_gqa(max_position_embeddings=32), None, 32),
        (llama_gqa(max_position_embeddings=32, rope_parameters=YARN), None, 128),
        (llama_gqa(max_position_embeddings=128, rope_parameters=YARN), None, 128),
        (llama_gqa(max_position_embeddings=32, rope_parameters=LINEAR), None, 128),
        (llama_gqa(max_position_embeddings=32, rope_parameters=DYNAMIC), None, 128),
        (llama_gqa(max_position_embeddings=128, rope_parameters=longrope()), None, 128),
        (llama_gqa(max_position_embeddings=64, rope_parameters=LLAMA3), None, 64),
        (
            gemma3(
                max_position_embeddings=32, rope_parameters={"full_attention": LINEAR, "sliding_attention": DEFAULT}
            ),
            None,
            128,
        ),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "model_type") else str(value),
)
def test_learned_positions_end_and_rotary_ones_do_not(config, positions, intended):
    dims = model_dims(config)
    assert (dims.max_positions, dims.intended_positions) == (positions, intended)


@pytest.mark.parametrize("rope", [YARN, LINEAR, DYNAMIC, DEFAULT], ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("layout", [{"ring_degree": 2}, {"ulysses_degree": 3}, {"pp_size": 2}], ids=str)
def test_what_transformers_runs_beyond_max_position_embeddings_is_run(rope, layout):
    model = build(llama_gqa(rope_parameters=rope, max_position_embeddings=32))
    ids = tokens(1, 100).clamp(min=1)
    want, continued = logits(model, ids), unsharded(model, ids, max_new_tokens=4)
    for got, generated in serve(
        model, lambda e: (e(ids).logits, e.generate(ids, torch.ones_like(ids), max_new_tokens=4, **GREEDY)), **layout
    ):
        assert relative_error(got, want) < 1e-5
        assert_same(generated, continued)


def test_a_text_longer_than_the_model_was_made_for_is_named_once(caplog):
    validation._note_beyond.cache_clear()
    caplog.set_level(logging.WARNING, "ds_ring")
    dims = model_dims(llama_gqa(max_position_embeddings=32))
    check_positions(30, 2, dims)
    assert caplog.messages == []
    check_positions(30, 3, dims)
    check_positions(90, 3, dims)
    assert caplog.messages == [
        "the model was made for 32 positions; longer texts run as in transformers, at lower quality"
    ]
