"""Which attention modules can be cut at their attention, and what is said of one that cannot."""

from __future__ import annotations

import threading

import pytest
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from ds_ring.engine.engine import Engine
from ds_ring.fusion import kv_first
from tests.helpers.attention_models import APART, LENGTH
from tests.helpers.mocked_world import relative_error, serve
from tests.helpers.tiny_models import ARCHITECTURES, build, logits, tokens


class _Gated(LlamaAttention):
    """Its result is gated by what went into the projections."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states)
        key, value = self.k_proj(hidden_states), self.v_proj(hidden_states)
        q, k, v = query.view(shape).transpose(1, 2), key.view(shape).transpose(1, 2), value.view(shape).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        out, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(query.shape) * query.sigmoid()), weights


def test_an_attention_that_cannot_be_cut_is_named_and_copies(seen, caplog):
    kv_first._log_once.cache_clear()
    model, ids = build(APART()), tokens(1, LENGTH)
    for layer in model.model.layers:
        layer.self_attn.__class__ = _Gated

    def work(engine: Engine) -> tuple[Tensor, list[str]]:
        found = engine(ids).logits
        return found, [event[0] for event in seen[threading.get_ident()]]

    alone, _ = serve(model, work)[0]
    with caplog.at_level("INFO", "ds_ring"):
        for got, events in serve(model, work, ring_degree=2):
            assert relative_error(got, alone) < 1e-5
            assert events.count("write") == 3
    assert (
        "are copied to where other ranks read them: _Gated: what follows the attention needs what went" in caplog.text
    )


@pytest.mark.parametrize("name", ["pythia", "llama_mqa", "qwen3", "gemma2", "gemma3", "mistral"])
def test_every_kind_of_attention_is_cut(name, seen):
    model, ids = build(ARCHITECTURES[name]()), tokens(2, LENGTH)

    def work(engine: Engine) -> tuple[Tensor, list[str]]:
        return engine(ids).logits, [event[0] for event in seen[threading.get_ident()]]

    for got, events in serve(model, work, ring_degree=2, batch_size=2, micro_batch_size=2):
        assert relative_error(got, logits(model, ids)) < 1e-5
        assert events.count("start") == model.config.num_hidden_layers
        assert "write" not in events
