"""Keys and values written where peers read them: the same numbers, no copies, under way before queries are made."""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from ds_ring.attention import ring
from ds_ring.attention.kv_exchange import KVExchange
from ds_ring.engine.engine import Engine
from ds_ring.errors import NumericsError
from ds_ring.fusion import kv_first
from ds_ring.hf.attention_context import AttentionContext
from ds_ring.hf.linear import Linear
from ds_ring.kernels import elementwise
from ds_ring.transport.copy_engine import CopyEngineTransport
from ds_ring.transport.peer_buffers import BufferPool, PeerBuffer
from tests.helpers.mocked_world import relative_error, serve
from tests.helpers.peer_threads import LATE_S, AtOnce, Later, all_are_late, copy_engine_mesh
from tests.helpers.tiny_models import ARCHITECTURES, build, gpt2, gpt_neox, llama_gqa, logits, phi3, tokens

WRONG = 1e-2
LENGTH = 61
FUSED = partial(gpt_neox, heads=4, num_hidden_layers=2)
APART = partial(llama_gqa, hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
"""One projection for q, k and v; three."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "ring3": {"ring_degree": 3},
    "ring2_pass_kv": {"ring_degree": 2, "ring_variant": "pass_kv"},
    "ring2_local_first": {"ring_degree": 2, "ring_variant": "local_first"},
    "ulysses2": {"ulysses_degree": 2},
    "ring2_ulysses2": {"ring_degree": 2, "ulysses_degree": 2},
}


def results(engine: Engine) -> tuple[Tensor, dict[str, int]]:
    found = engine(tokens(3, LENGTH)).logits
    engine.mesh.traffic.bytes_by_op.clear()
    engine.prefill(engine.prepare(tokens(3, LENGTH), None, None)[0], "last")
    return found, dict(engine.mesh.traffic.bytes_by_op)


@pytest.mark.parametrize("wire", ["threads", "copy_engine"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("config", [FUSED, APART, phi3, gpt2], ids=["fused", "apart", "phi3", "gpt2"])
def test_the_same_numbers_and_bytes_as_with_copies(config, layout, wire, monkeypatch):
    """Two micro-batches, in flight together where the copy engine serves."""
    model, options = build(config()), {"wire": wire, "micro_batch_size": 2, **layout}
    in_place = serve(model, results, **options)
    monkeypatch.setattr(AttentionContext, "has_qkv_buffers", lambda *_: False)
    for (got, sent), (want, want_sent) in zip(in_place, serve(model, results, **options), strict=True):
        assert torch.equal(got, want)
        assert sent == want_sent


@pytest.mark.parametrize("ranks", [2, 3])
def test_segments_apart_hold_what_one_segment_holds(ranks, monkeypatch):
    """For kernels that take several, own keys stay where they were made; for others they are copied among the rest."""

    def work(engine: Engine) -> tuple[Tensor, dict[str, int], set[int]]:
        engine.mesh.traffic.bytes_by_op.clear()
        shards = engine.prefill(engine.prepare(tokens(3, LENGTH), None, None)[0], "all")
        found = torch.cat([shard.logits_BkV for shard in shards])
        return found, dict(engine.mesh.traffic.bytes_by_op), {len(segments) for segments in attended}

    attended: list[Any] = []
    attend = ring.attend_ranges
    monkeypatch.setattr(
        ring, "attend_ranges", lambda q, runs, keys, *rest: attended.append(keys) or attend(q, runs, keys, *rest)
    )
    options = {"wire": "copy_engine", "ring_degree": ranks, "ring_variant": "gather_kv"}
    joined = serve(build(FUSED()), work, **options)
    assert all(counts == {1} for *_, counts in joined)
    attended.clear()
    monkeypatch.setattr(ring, "takes_segments", lambda *_: True)
    for (got, sent, counts), (want, want_sent, _) in zip(serve(build(FUSED()), work, **options), joined, strict=True):
        assert sent == want_sent
        assert min(counts) > 1
        assert got.isfinite().all()
        assert torch.equal(got, want)


@pytest.fixture
def seen(monkeypatch) -> dict[int, list[tuple[Any, ...]]]:
    """What each rank's thread did, in order: (what, where in memory)."""
    events: dict[int, list[tuple[Any, ...]]] = defaultdict(list)

    def watch(owner: Any, name: str, event: Callable[..., tuple[Any, ...]]) -> None:
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            events[threading.get_ident()].append(event(*args))
            return result

        monkeypatch.setattr(owner, name, watched)

    watch(elementwise, "put", lambda x, out, cos_sin=None: ("turn" if cos_sin else "copy", out.data_ptr()))
    watch(elementwise, "turn_", lambda x, cos_sin: ("turn in place", x.data_ptr()))
    watch(Linear, "into", lambda product, x, out: ("project", out.data_ptr()))
    watch(KVExchange, "__init__", lambda self, *_: ("open", self.own_2BLKD[0].data_ptr(), self.own_2BLKD[1].data_ptr()))
    watch(KVExchange, "start", lambda self: ("start",))
    watch(KVExchange, "write", lambda self, *_: ("write",))
    watch(CopyEngineTransport, "send_buffer", lambda self, *_: ("send_buffer",))
    return events


@pytest.mark.parametrize("wire", ["threads", "copy_engine"])
@pytest.mark.parametrize(
    ("config", "value", "query"),
    [(FUSED, "copy", "turn in place"), (APART, "project", "turn in place"), (phi3, "copy", "turn")],
)
def test_the_shared_tensor_is_what_was_written(config, value, query, wire, seen):
    """A layer: k's rotation and v's projection (or the one pass that takes v out of a fused projection) into the
    tensor that peers read; that is published; and only then q's rotation, in place where that can be."""
    model = build(config())

    def work(engine: Engine) -> list[tuple[Any, ...]]:
        engine(tokens(1, LENGTH))
        seen[threading.get_ident()].clear()
        engine(tokens(1, LENGTH))
        return seen[threading.get_ident()]

    for events in serve(model, work, ring_degree=2, wire=wire):
        if config is FUSED:
            # Peers take k and v out of the projection that they are parts of.
            layer = ["open", "project", "turn in place", "start", "turn in place"]
            assert [event[0] for event in events] == layer * model.config.num_hidden_layers
            for opened, project in zip(events[0::5], events[1::5], strict=True):
                k_at, v_at = opened[1] - project[1], opened[2] - project[1]
                assert 2 * k_at == v_at > 0
            continue
        layers = [events[i : i + 5] for i in range(0, len(events), 5)]
        assert len(layers) == model.config.num_hidden_layers
        for opened, key, values, start, queries in layers:
            assert (opened[0], start) == ("open", ("start",))
            assert (key, values) == (("turn", opened[1]), (value, opened[2]))
            assert queries[0] == query
            assert queries[1] not in opened


def test_a_query_projection_of_its_own_runs_when_keys_are_under_way(seen):
    def work(engine: Engine) -> list[str]:
        own = seen[threading.get_ident()]
        for layer in engine.runner.decoder.layers:
            layer.self_attn.q_proj.register_forward_hook(lambda *_: own.append(("q_proj",)))
        engine(tokens(1, LENGTH))
        return [event[0] for event in own if event[0] in ("start", "q_proj")]

    for events in serve(build(APART()), work, ring_degree=2):
        assert events == ["start", "q_proj"] * 3


def test_heads_for_other_ranks_are_taken_out_of_the_projection(seen):
    """One product and the rotation in place: no pass but those."""

    def work(engine: Engine) -> list[str]:
        engine(tokens(1, LENGTH))
        return [event[0] for event in seen[threading.get_ident()]]

    for events in serve(build(FUSED()), work, ulysses_degree=2, wire="copy_engine"):
        # One buffer for q, k and v, one for the result. (Recognising the rotary function called ours.)
        assert events[-10:] == ["send_buffer", "project", *["turn in place"] * 2, "send_buffer"] * 2


def test_heads_for_other_ranks_of_what_is_no_whole_projection_go_straight_into_the_send_buffer(seen):
    """Each rank's share of k, v and q, for each of two ranks: no pass but those."""

    def work(engine: Engine) -> list[str]:
        engine(tokens(1, LENGTH))
        return [event[0] for event in seen[threading.get_ident()]]

    for events in serve(build(phi3()), work, ulysses_degree=2, wire="copy_engine"):
        assert events[-8:] == ["send_buffer", *["turn"] * 2, *["copy"] * 2, *["turn"] * 2, "send_buffer"]


class TestMistakesShow:
    """The protocol's waits, left out, give wrong logits of a whole model. What a wait would have held back happens on
    purpose: no schedule is left to chance."""

    PATIENCE_S = 5.0

    @staticmethod
    def error(monkeypatch, delay: Callable[[int, int], float], **options: Any) -> float:
        monkeypatch.setattr("tests.helpers.mocked_world.copy_engine_mesh", lambda: copy_engine_mesh(delay))
        model, ids = build(FUSED(num_hidden_layers=4)), tokens(2, LENGTH)
        options |= {"ring_degree": 3, "wire": "copy_engine", "batch_size": 2, "micro_batch_size": 2}
        try:
            # Memory that peers read is there from the first forward on.
            got = serve(model, lambda engine: [engine(ids).logits for _ in range(2)][-1], **options)
        except NumericsError:
            return math.inf  # memory that nobody has written yet holds NaN
        return max(relative_error(found, logits(model, ids)) for found in got)

    def test_reading_before_the_owner_has_written(self, monkeypatch):
        """Rank 0 writes when others have begun to read."""
        assert self.error(monkeypatch, all_are_late) < 1e-5
        begun, acquire = threading.Event(), BufferPool.acquire

        def late(slots: BufferPool, needed: int) -> PeerBuffer:
            slot = acquire(slots, needed)
            if slots._rank == 0:
                begun.wait(self.PATIENCE_S)
                time.sleep(LATE_S)
            return slot

        def delay(rank: int, peer: int) -> float:
            if peer == 0:
                begun.set()
            return 0.0

        monkeypatch.setattr(BufferPool, "acquire", late)
        monkeypatch.setattr(Later, "wait_flag", lambda *_: None)
        assert not self.error(monkeypatch, delay) < WRONG

    def test_writing_before_all_readers_are_through(self, monkeypatch):
        """Rank 0 of a contiguous ring is read and never reads: nothing but flags holds it back. Readers wait for it."""
        assert self.error(monkeypatch, all_are_late, ring_impl="contiguous") < 1e-5
        started: list[int] = []
        through, start, wait = threading.Event(), KVExchange.start, AtOnce.wait_flag

        def counted(exchange: KVExchange) -> None:
            start(exchange)
            started.extend([0] if exchange.transport.rank == 0 else [])
            if len(started) == 8:
                through.set()

        monkeypatch.setattr(KVExchange, "start", counted)
        monkeypatch.setattr(
            AtOnce, "wait_flag", lambda self, *what: None if type(self) is AtOnce else wait(self, *what)
        )

        def delay(rank: int, peer: int) -> float:
            # In the second forward, until rank 0 has been through all of its layers.
            if peer != rank and len(started) > 4:
                through.wait(self.PATIENCE_S)
            return 0.0

        assert not self.error(monkeypatch, delay, ring_impl="contiguous") < WRONG


@pytest.mark.parametrize("layout", [{"ring_degree": 2}, {"ulysses_degree": 2}], ids=str)
def test_steps_of_a_generation_keep_their_way(layout, seen):
    """The first forward has a place where keys lie together for the cache; steps have none."""
    model, ids = build(FUSED()), tokens(2, 21)

    def work(engine: Engine) -> tuple[Tensor, int]:
        found = engine.generate(ids, max_new_tokens=4, do_sample=False)
        return found, [event[0] for event in seen[threading.get_ident()]].count("start")

    want = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for got, starts in serve(model, work, max_length=64, batch_size=2, micro_batch_size=2, **layout):
        assert torch.equal(got, want)
        assert starts == (2 if "ring_degree" in layout else 0)


@pytest.mark.parametrize("options", [{}, {"fusion": "none", "ring_degree": 2}], ids=str)
def test_nothing_is_placed_where_nobody_reads_or_nothing_is_fused(options, seen):
    def work(engine: Engine) -> list[str]:
        engine(tokens(1, LENGTH))
        return [event[0] for event in seen[threading.get_ident()]]

    for events in serve(build(APART()), work, **options):
        assert "project" not in events
        assert events.count("write") == (3 if options else 0)


class _Shared(LlamaAttention):
    """Its values are its keys before they turn."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k = (f(hidden_states).view(shape).transpose(1, 2) for f in (self.q_proj, self.k_proj))
        v = k
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        out, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


@pytest.mark.parametrize(
    ("config", "attention", "turns"), [(FUSED, None, 2), (APART, None, 2), (phi3, None, 0), (APART, _Shared, 0)]
)
def test_queries_and_keys_turn_where_they_lie_if_nothing_else_reads_them(config, attention, turns, seen):
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
    assert (events.count("turn in place"), events.count("turn")) == (turns * layers, (2 - turns) * layers)


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


def test_an_attention_that_cannot_be_split_is_named_and_copies(seen, caplog):
    kv_first._tell.cache_clear()
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
    assert "are copied to where peers read them: _Gated: what follows the attention needs what went" in caplog.text


@pytest.mark.parametrize("name", ["pythia", "llama_mqa", "qwen3", "gemma2", "gemma3", "mistral"])
def test_every_kind_of_attention_is_placed(name, seen):
    model, ids = build(ARCHITECTURES[name]()), tokens(2, LENGTH)

    def work(engine: Engine) -> tuple[Tensor, list[str]]:
        return engine(ids).logits, [event[0] for event in seen[threading.get_ident()]]

    for got, events in serve(model, work, ring_degree=2, batch_size=2, micro_batch_size=2):
        assert relative_error(got, logits(model, ids)) < 1e-5
        assert events.count("start") == model.config.num_hidden_layers
        assert "write" not in events
