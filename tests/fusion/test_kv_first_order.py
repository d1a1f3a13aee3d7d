"""What a layer does to make q, k and v, and in which order: no copies, and keys in transfer before queries are made."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from ds_ring.engine.engine import Engine
from tests.helpers.attention_models import APART, FUSED, LENGTH
from tests.helpers.mocked_world import relative_error, serve
from tests.helpers.tiny_models import build, logits, phi3, tokens


@pytest.mark.parametrize("wire", ["threads", "copy_engine"])
@pytest.mark.parametrize(
    ("config", "value", "query"),
    [(FUSED, "copy", "rotate in place"), (APART, "project", "rotate in place"), (phi3, "copy", "rotate")],
)
def test_the_shared_tensor_is_what_was_written(config, value, query, wire, seen):
    """In a layer k is rotated and v is projected into the tensor that other ranks read; or v is copied there in one
    pass out of a fused projection. That tensor is published, and only then q is rotated, in place where that can be."""
    model = build(config())

    def work(engine: Engine) -> list[tuple[Any, ...]]:
        engine(tokens(1, LENGTH))
        seen[threading.get_ident()].clear()
        engine(tokens(1, LENGTH))
        return seen[threading.get_ident()]

    for events in serve(model, work, ring_degree=2, wire=wire):
        if config is FUSED:
            # Other ranks read k and v as views of the projection.
            layer = ["open", "project", "rotate in place", "start", "rotate in place"]
            assert [event[0] for event in events] == layer * model.config.num_hidden_layers
            for opened, project in zip(events[0::5], events[1::5], strict=True):
                k_at, v_at = opened[1] - project[1], opened[2] - project[1]
                assert 2 * k_at == v_at > 0
            continue
        layers = [events[i : i + 5] for i in range(0, len(events), 5)]
        assert len(layers) == model.config.num_hidden_layers
        for opened, key, values, start, queries in layers:
            assert (opened[0], start) == ("open", ("start",))
            assert (key, values) == (("rotate", opened[1]), (value, opened[2]))
            assert queries[0] == query
            assert queries[1] not in opened


def test_a_query_projection_of_its_own_runs_when_keys_are_in_transfer(seen):
    def work(engine: Engine) -> list[str]:
        own = seen[threading.get_ident()]
        for layer in engine.runner.decoder.layers:
            layer.self_attn.q_proj.register_forward_hook(lambda *_: own.append(("q_proj",)))
        engine(tokens(1, LENGTH))
        return [event[0] for event in own if event[0] in ("start", "q_proj")]

    for events in serve(build(APART()), work, ring_degree=2):
        assert events == ["start", "q_proj"] * 3


def test_other_ranks_read_their_heads_out_of_the_projection(seen):
    """One matrix product and the rotation in place: no other pass."""

    def work(engine: Engine) -> list[str]:
        engine(tokens(1, LENGTH))
        return [event[0] for event in seen[threading.get_ident()]]

    for events in serve(build(FUSED()), work, ulysses_degree=2, wire="copy_engine"):
        # One buffer for q, k and v, one for the result. The events before are those of recognising the rotary function.
        assert events[-10:] == ["send_buffer", "project", *["rotate in place"] * 2, "send_buffer"] * 2


def test_heads_that_are_no_columns_of_a_projection_are_written_to_the_send_buffer(seen):
    """Each of two ranks' heads of k, v and q: no other pass."""

    def work(engine: Engine) -> list[str]:
        engine(tokens(1, LENGTH))
        return [event[0] for event in seen[threading.get_ident()]]

    for events in serve(build(phi3()), work, ulysses_degree=2, wire="copy_engine"):
        assert events[-8:] == ["send_buffer", *["rotate"] * 2, *["copy"] * 2, *["rotate"] * 2, "send_buffer"]


@pytest.mark.parametrize("options", [{}, {"fusion": "none", "ring_degree": 2}], ids=str)
def test_no_buffers_where_no_other_rank_reads_or_nothing_is_fused(options, seen):
    def work(engine: Engine) -> list[str]:
        engine(tokens(1, LENGTH))
        return [event[0] for event in seen[threading.get_ident()]]

    for events in serve(build(APART()), work, **options):
        assert "project" not in events
        assert events.count("write") == (3 if options else 0)


class _Shared(LlamaAttention):
    """Its values are its keys before rotation."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k = (f(hidden_states).view(shape).transpose(1, 2) for f in (self.q_proj, self.k_proj))
        v = k
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        out, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


@pytest.mark.parametrize(
    ("config", "attention", "in_place"), [(FUSED, None, 2), (APART, None, 2), (phi3, None, 0), (APART, _Shared, 0)]
)
def test_queries_and_keys_rotate_in_place_if_nothing_else_reads_their_memory(config, attention, in_place, seen):
    model, ids = build(config()), tokens(2, LENGTH)
    if attention is not None:
        for layer in model.model.layers:
            layer.self_attn.__class__ = attention
    want = logits(model, ids)

    def work(engine: Engine) -> tuple[Tensor, list[str]]:
        engine(ids)
        seen[threading.get_ident()].clear()
        return engine(ids).logits, [event[0] for event in seen[threading.get_ident()]]

    ((got, events),) = serve(model, work, batch_size=2, micro_batch_size=2)
    assert relative_error(got, want) < 1e-5
    layers = model.config.num_hidden_layers
    assert (events.count("rotate in place"), events.count("rotate")) == (in_place * layers, (2 - in_place) * layers)
