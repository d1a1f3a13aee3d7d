"""Decoders whose layers differ in head size and key/value heads, as Gemma 4's do: head_dim 512 in every few of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import Gemma4TextConfig

from ds_ring.config import RunConfig
from ds_ring.engine.batch import pack
from ds_ring.engine.engine import Engine
from ds_ring.errors import UnsupportedModelError
from ds_ring.hf.dims import model_dims
from ds_ring.planning.comm_volume import bytes_sent_per_rank
from ds_ring.planning.validation import check_layout
from tests.helpers.mocked_world import outcome, relative_error, serve
from tests.helpers.tiny_models import build, logits, tokens


def gemma4(**overrides: object) -> Gemma4TextConfig:
    """Sliding layers of 2 key/value heads x 12, full ones of 1 x 24 whose keys are the values as well; the last two
    take those of earlier layers. Every layer has embeddings of its own."""
    sizes = {
        "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 12, "global_head_dim": 24, "num_global_key_value_heads": 1,
        "attention_k_eq_v": True, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 3,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "num_kv_shared_layers": 2,
        "max_position_embeddings": 1024, "final_logit_softcapping": 30.0, "pad_token_id": 0,
    }  # fmt: skip
    return Gemma4TextConfig(**sizes | overrides)


LAYOUTS = [{"ring_degree": 3}, {"ulysses_degree": 4}, {"ring_degree": 2, "ulysses_degree": 2}]


def test_their_shape():
    dims = model_dims(gemma4())
    assert dims.unlike_layers == ((2, 12), (1, 24)) * 3
    assert (dims.num_kv_heads, dims.head_dim) == (1, 24)
    alike = model_dims(gemma4(global_head_dim=12, num_global_key_value_heads=2))
    assert alike.unlike_layers == ()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_logits_and_tokens_are_the_unsharded_model_s(layout):
    model, ids = build(gemma4()), tokens(2, 45).clamp(min=1)
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = logits(model, ids)
    with torch.no_grad():
        generated = model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    def work(engine: Engine) -> tuple[Tensor, Tensor, float]:
        found = engine(ids).logits
        engine.mesh.traffic.bytes_by_op.clear()
        engine.prefill(pack(ids, None, None, engine.runner.dims)[0], "none")
        sent = engine.mesh["world"].all_gather_objects(engine.mesh.traffic.bytes_sent)
        return found, engine.generate(ids, **options), sum(sent) / len(sent)

    config = RunConfig.load({"ds_ring": {"parallel": layout}})
    sent = bytes_sent_per_rank(config, model_dims(gemma4()), 2, 45, itemsize=4)
    for got, new, counted in serve(model, work, **layout):
        assert relative_error(got, want) < 1e-5
        assert torch.equal(new, generated)
        assert counted == sent


@pytest.mark.parametrize("parallel", [{"pp_size": 2}, {"decode": "sliced", "ring_degree": 2}], ids=str)
def test_what_does_not_serve_them_is_refused(parallel):
    config = RunConfig.load({"ds_ring": {"parallel": parallel}})
    error = outcome(lambda: check_layout(config, model_dims(gemma4()), 2))
    assert isinstance(error, UnsupportedModelError)
    assert str(error).startswith("gemma4_text has layers with unlike heads")
