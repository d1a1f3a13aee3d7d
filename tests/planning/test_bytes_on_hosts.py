"""Bytes that stay in a host and that leave it, in closed form, against counts at the mocked transports."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from ds_ring.config import RunConfig
from ds_ring.engine.engine import Engine
from ds_ring.hf.dims import model_dims
from ds_ring.model_dims import ModelDims
from ds_ring.parallel.topology import Axis
from ds_ring.planning.candidates import degrees
from ds_ring.planning.comm_volume import bytes_by_axis
from tests.helpers.counted_peers import Pairs, PeerCounts
from tests.helpers.mocked_world import serve
from tests.helpers.tiny_models import build, gpt_neox, tokens

HOSTS = (1, 2, 4)
LENGTH = 67
ANY = ModelDims("gpt_neox", 16, 128, 16, 16, 8, 512, 97, 2048)


def layouts(ranks: int) -> list[dict[str, Any]]:
    """Every layout that the planner considers."""
    return [{name: size for name, size in chosen.items() if size > 1} for chosen in degrees(ranks, ANY)]


@cache
def counted(names: tuple[tuple[str, int], ...]) -> tuple[RunConfig, ModelDims, dict[Axis, Pairs]]:
    """What pairs of ranks send along each axis in one prefill for the last token."""
    options = dict(names)
    config = gpt_neox(layers=max(2, options.get("pp_size", 1)))
    batch, counts = options.get("dp_size", 1), PeerCounts()

    def work(engine: Engine) -> None:
        ready, _ = engine.prepare(tokens(batch, LENGTH), None, None)
        counts.watch(engine)
        engine.prefill(ready, "last")

    with counts.all_reduces():
        serve(build(config), work, max_length=LENGTH, batch_size=batch, **options)
    run = RunConfig.load({"dtype": "fp32"}, max_length=LENGTH, batch_size=batch, **options)
    return run, model_dims(config), counts.by_axis


def on_hosts(pairs: Pairs, ranks: int, per_host: int) -> tuple[float, float, list[float], list[float]]:
    """(mean bytes a rank sends in its host, mean it sends to others, and by rank what it has to do of either)."""
    near, far = ([0.0] * ranks, [0.0] * ranks), ([0.0] * ranks, [0.0] * ranks)
    for (sender, receiver), sent in pairs.items():
        out, into = near if sender // per_host == receiver // per_host else far
        out[sender] += sent
        into[receiver] += sent
    busy_near, busy_far = ([max(both) for both in zip(*of, strict=True)] for of in (near, far))
    return sum(near[0]) / ranks, sum(far[0]) / ranks, busy_near, busy_far


@pytest.mark.parametrize("options", [pytest.param(one, id=str(one)) for ranks in (8, 16) for one in layouts(ranks)])
def test_every_layout_of_8_and_16_ranks_on_1_2_and_4_hosts(options):
    run, dims, pairs = counted(tuple(options.items()))
    ranks = run.topology.world_size
    for hosts in HOSTS:
        per_host = ranks // hosts
        planned = bytes_by_axis(run, dims, run.workload.batch_size, LENGTH, 4, per_host)
        assert set(planned) == {axis for axis, sent in pairs.items() if sent}
        for axis, sent in planned.items():
            near, far, busy_near, busy_far = on_hosts(pairs[axis], ranks, per_host)
            assert (sent.near, sent.far) == pytest.approx((near, far)), (axis, hosts)
            if axis != "tp":  # NCCL's rings leave a host by several ranks in turn, the counted one by the same
                assert (sent.most_near, sent.most_far) == pytest.approx((max(busy_near), max(busy_far))), (axis, hosts)


def test_hosts_that_an_axis_does_not_fit_are_counted_too():
    """Eight ranks on hosts of three: some groups of two are on two hosts."""
    run, dims, pairs = counted((("ring_degree", 2), ("ulysses_degree", 2), ("dp_size", 2)))
    planned = bytes_by_axis(run, dims, 2, LENGTH, 4, 3)
    for axis, sent in planned.items():
        near, far, _, _ = on_hosts(pairs[axis], 8, 3)
        assert (sent.near, sent.far) == pytest.approx((near, far)), axis


def test_the_papers_layout_by_hand():
    """Ulysses 8 x ring 2 on two hosts, one sequence a time, 2 bytes: ring ranks send each other 1 and 2 chunks."""
    dims = replace(ANY, num_layers=4, hidden_size=8192, head_dim=512, max_positions=None)
    run = RunConfig.load({"dtype": "fp16"}, ulysses_degree=8, ring_degree=2, batch_size=1024, max_length=10_000)
    sent = bytes_by_axis(run, dims, 1024, 10_000, 2, 8)
    # Sequences, layers, tokens, K and V, heads of a rank, head_dim, bytes.
    chunk = 1024 * 4 * 2500 * 2 * 2 * 512 * 2
    assert sent["ring"].far == 1.5 * chunk == pytest.approx(63e9, rel=2e-3)
    assert sent["ring"].most_far == 2 * chunk
    assert sent["ring"].near == 0
    assert sent["ulysses"].far == 0
