"""k and v made in the buffers that other ranks read: the same numbers and bytes as with copies."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_ring.attention import ring
from ds_ring.engine.engine import Engine
from ds_ring.hf.attention_context import AttentionContext
from tests.helpers.attention_models import APART, FUSED, LENGTH
from tests.helpers.mocked_world import serve
from tests.helpers.tiny_models import build, gpt2, phi3, tokens

LAYOUTS: dict[str, dict[str, Any]] = {
    "ring3": {"ring_degree": 3},
    "ring2_pass_kv": {"ring_degree": 2, "ring_variant": "pass_kv"},
    "ring2_local_first": {"ring_degree": 2, "ring_variant": "local_first"},
    "ulysses2": {"ulysses_degree": 2},
    "ring2_ulysses2": {"ring_degree": 2, "ulysses_degree": 2},
}


def results(engine: Engine) -> tuple[Tensor, dict[str, int]]:
    engine.mesh.traffic.bytes_by_op.clear()
    found = engine(tokens(3, LENGTH)).logits
    return found, dict(engine.mesh.traffic.bytes_by_op)


@pytest.mark.parametrize("wire", ["threads", "copy_engine"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("config", [FUSED, APART, phi3, gpt2], ids=["fused", "apart", "phi3", "gpt2"])
def test_the_same_numbers_and_bytes_as_with_copies(config, layout, wire, monkeypatch):
    """Two micro-batches, in flight together with the copy engine."""
    model, options = build(config()), {"wire": wire, "micro_batch_size": 2, **layout}
    in_place = serve(model, results, **options)
    monkeypatch.setattr(AttentionContext, "qkv_destination", lambda *_: "own_memory")
    for (got, sent), (want, want_sent) in zip(in_place, serve(model, results, **options), strict=True):
        assert torch.equal(got, want)
        assert sent == want_sent


@pytest.mark.parametrize("ranks", [2, 3])
def test_segments_apart_hold_what_one_segment_holds(ranks, monkeypatch):
    """For kernels that take several segments, own keys are not copied; for others they are copied among the rest."""

    def work(engine: Engine) -> tuple[Tensor, dict[str, int], set[int]]:
        engine.mesh.traffic.bytes_by_op.clear()
        shards = engine.prefill(engine.prepare(tokens(3, LENGTH), None, None)[0], "all")
        found = torch.cat([shard.logits_BkV for shard in shards])
        return found, dict(engine.mesh.traffic.bytes_by_op), {len(segments) for segments in attended}

    attended: list[Any] = []
    attend = ring.attend_ranges
    monkeypatch.setattr(
        ring, "attend_ranges", lambda q, ranges, keys, *rest: attended.append(keys) or attend(q, ranges, keys, *rest)
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


@pytest.mark.parametrize("layout", [{"ring_degree": 2}, {"ulysses_degree": 2}], ids=str)
def test_only_the_first_step_of_a_generation_exchanges_keys(layout, seen):
    """A ring's first forward has keys of all heads together, for the cache; later steps attend to the cache."""
    model, ids = build(FUSED()), tokens(2, 21)

    def work(engine: Engine) -> tuple[Tensor, int]:
        found = engine.generate(ids, max_new_tokens=4, do_sample=False)
        return found, [event[0] for event in seen[threading.get_ident()]].count("start")

    want = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for got, starts in serve(model, work, max_length=64, batch_size=2, micro_batch_size=2, **layout):
        assert torch.equal(got, want)
        assert starts == (2 if "ring_degree" in layout else 0)
