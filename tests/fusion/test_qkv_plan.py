"""Where q, k and v are made, and how: the plan of each layer in each layout."""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest

from ds_ring.attention.qkv_layout import ColumnsByRank
from ds_ring.engine.engine import Engine
from ds_ring.fusion import kv_first
from ds_ring.fusion.qkv_plan import QKVPlan
from ds_ring.fusion.tiling import WHOLE
from ds_ring.transport.shared import ViewOf
from tests.helpers.attention_models import APART, FUSED, LENGTH
from tests.helpers.mocked_world import serve
from tests.helpers.tiny_models import build, phi3, tokens

RING, ULYSSES = {"ring_degree": 2}, {"ulysses_degree": 2}
COPY_ENGINE = {"wire": "copy_engine"}
ROTATED = {"rotate_k": True, "rotate_q": True}


@pytest.fixture
def plans(monkeypatch) -> dict[int, list[QKVPlan]]:
    """The plans that the thread of each rank has made, in order."""
    made: dict[int, list[QKVPlan]] = defaultdict(list)
    plan_qkv = kv_first.plan_qkv

    def kept(*args: Any) -> QKVPlan:
        made[threading.get_ident()].append(plan_qkv(*args))
        return made[threading.get_ident()][-1]

    monkeypatch.setattr(kv_first, "plan_qkv", kept)
    return made


@pytest.mark.parametrize(
    ("config", "layout", "want", "read"),
    [
        (FUSED, {}, QKVPlan("own_memory", k_in_place=True, q_in_place=True), None),
        (APART, {}, QKVPlan("own_memory", k_in_place=True, q_in_place=True), None),
        (phi3, {}, QKVPlan("own_memory"), None),
        (FUSED, RING, QKVPlan("ring_buffer", **ROTATED, k_in_place=True, q_in_place=True), ViewOf),
        (APART, RING, QKVPlan("ring_buffer", **ROTATED, q_in_place=True), None),
        (phi3, RING, QKVPlan("ring_buffer", **ROTATED), None),
        (FUSED, ULYSSES | COPY_ENGINE, QKVPlan("ulysses_buffer", **ROTATED, k_in_place=True, q_in_place=True),
         ColumnsByRank),
        (FUSED, ULYSSES, QKVPlan("ulysses_buffer", **ROTATED), None),  # messages take no columns
        (APART, ULYSSES | COPY_ENGINE, QKVPlan("ulysses_buffer", **ROTATED), None),
        (FUSED, RING | ULYSSES | COPY_ENGINE,
         QKVPlan("ulysses_buffer", **ROTATED, k_in_place=True, q_in_place=True), ColumnsByRank),
    ],
)  # fmt: skip
def test_every_layer_of_a_layout_has_the_same_plan(config, layout, want, read, plans):
    model = build(config())

    def work(engine: Engine) -> list[QKVPlan]:
        engine(tokens(1, LENGTH))
        return plans[threading.get_ident()]

    for own in serve(model, work, **layout):
        assert len(own) == model.config.num_hidden_layers
        for plan in own:
            assert replace(plan, projection=None) == want
            assert plan.tiles == (WHOLE,)
            assert (None if plan.projection is None else type(plan.projection.read)) is read


@pytest.mark.parametrize(("config", "q_by_tile"), [(FUSED, True), (APART, False)])
@pytest.mark.parametrize("layout", [{}, RING, ULYSSES | COPY_ENGINE], ids=str)
def test_tiles_are_written_one_by_one_wherever_there_are_several(layout, config, q_by_tile, plans):
    """A projection that q shares with k and v is held for one tile only."""

    def work(engine: Engine) -> list[QKVPlan]:
        engine(tokens(1, LENGTH))
        return plans[threading.get_ident()]

    destination = "ulysses_buffer" if "ulysses_degree" in layout else "ring_buffer"
    for own in serve(build(config()), work, block_tokens=16, **layout):
        assert own
        for plan in own:
            assert len(plan.tiles) == (4 if not layout else 2)
            assert replace(plan, tiles=(WHOLE,)) == QKVPlan(destination, **ROTATED, q_by_tile=q_by_tile)


@pytest.mark.parametrize(("layout", "first"), [(RING, "ring_buffer"), (ULYSSES, "own_memory")], ids=str)
def test_steps_of_a_generation_use_no_buffers(layout, first, plans):
    """A first step with Ulysses uses none either: the cache stores k and v of all heads together."""
    model, ids = build(FUSED()), tokens(2, 21)

    def work(engine: Engine) -> list[str]:
        engine.generate(ids, max_new_tokens=3, do_sample=False)
        return [plan.destination for plan in plans[threading.get_ident()]]

    for own in serve(model, work, max_length=64, batch_size=2, micro_batch_size=2, **layout):
        assert own[:2] == [first] * 2
        assert set(own[2:]) <= {"own_memory"}
