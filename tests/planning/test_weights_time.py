"""Fetching a layer beside computing the one before, by hand, and memory against what ranks hold."""

import math

import pytest

from ds_ring.config import RunConfig
from ds_ring.hf.dims import model_dims
from ds_ring.hf.flops import linear_parameters
from ds_ring.planning.cards import CARDS
from ds_ring.planning.memory_estimate import peak_bytes
from ds_ring.planning.plan import plans
from ds_ring.planning.step_time import step_time
from ds_ring.planning.weights_time import Fetching, fetching
from tests.helpers.mocked_world import serve
from tests.helpers.tiny_models import build, gpt_neox

H100 = CARDS["H100"]


def run_of(**options):
    return RunConfig.load({"dtype": "bf16"}, **options)


def test_half_of_a_layer_comes_from_the_other_rank():
    """Llama 3 70B: 80 layers of 856 M parameters, 1.71 GB; of which half takes 2.4 ms at 353 GB/s."""
    dims, parameters = model_dims(build(gpt_neox(layers=4)).config), 4 * 856_000_000
    got = fetching(run_of(weights="sharded", ring_degree=2), dims, parameters, H100, pulls=True)
    assert got.layer_s == pytest.approx(856e6 * 2 / 2 / 353e9)
    assert got.layers == 4
    assert got.by_links
    assert got.shown(1.0) == got.layer_s
    assert got.shown(0.001) == pytest.approx(3 * got.layer_s - 0.001 + got.layer_s)
    assert fetching(run_of(ring_degree=2), dims, parameters, H100, pulls=True) == Fetching(0.0, 0, False, 0.0)


def test_streamed_is_bound_by_the_slower_of_both_ways():
    dims, parameters = model_dims(build(gpt_neox(layers=4)).config), 4 * 856_000_000
    alone = fetching(run_of(weights="streamed"), dims, parameters, H100, pulls=False)
    assert alone.layer_s == pytest.approx(1.712e9 / H100.host_bytes)
    assert not alone.by_links
    two = fetching(run_of(weights="streamed", ring_degree=2), dims, parameters, H100, pulls=True)
    assert two.layer_s == pytest.approx(alone.layer_s / 2)
    assert alone.beside == H100.rates.beside_copies < two.beside < H100.rates.beside_nccl


def test_each_round_of_micro_batches_in_flight_fetches_every_layer():
    dims, parameters = model_dims(build(gpt_neox(layers=4)).config), 4_000_000
    run = run_of(weights="sharded", ring_degree=2, batch_size=8, in_flight=4)
    assert fetching(run, dims, parameters, H100, pulls=True).layers == 2 * 4


def test_sixteen_ranks_on_two_hosts_hold_a_copy_on_each():
    model = build(gpt_neox(heads=16))
    dims, parameters = model_dims(model.config), linear_parameters(model.config)
    run = run_of(weights="sharded", max_length=1600, batch_size=4)
    held = {plan.label: plan.config.topology.weights for plan in plans(run, dims, parameters, 16, H100)}
    assert held["ring16_sharded"] == 8
    assert held["dp2_ring8_sharded"] == 8
    assert held["dp4_ring4_sharded"] == 4


def test_a_step_waits_for_the_first_layer_at_least():
    dims, parameters = model_dims(build(gpt_neox(layers=4)).config), 4 * 856_000_000
    long = {"ring_degree": 2, "max_length": 131072}
    whole = step_time(run_of(**long), dims, parameters, H100)
    sharded = step_time(run_of(**long, weights="sharded"), dims, parameters, H100)
    assert whole.weights == 0
    assert sharded.weights == pytest.approx(856e6 / 353e9)
    assert sharded.total > whole.total
    assert "waits for weights" in step_time(run_of(ring_degree=2, weights="sharded"), dims, parameters, H100).text()


@pytest.mark.parametrize("place", ["sharded", "streamed"])
def test_weights_take_the_memory_that_is_predicted(place):
    """But for norms and biases, which are small in real models."""
    model = build(gpt_neox(heads=32, layers=6))
    dims, parameters = model_dims(model.config), linear_parameters(model.config)
    options = {"ring_degree": 4, "max_length": 1}
    small = sum(p.nbytes for p in model.parameters() if p.dim() < 2)

    def held(engine):
        weights = engine.runner.weights
        on_host = weights.parts.memory.nbytes if place == "streamed" else 0
        return weights.nbytes - on_host - small

    config = RunConfig.load({"dtype": "fp32"}, weights=place, **options)
    whole = RunConfig.load({"dtype": "fp32"}, **options)
    everything = sum(p.nbytes for p in model.parameters()) - small
    one_token = peak_bytes(whole, dims, parameters, 1) - everything
    said = peak_bytes(config, dims, parameters, 1) - one_token
    for got in serve(model, held, weights=place, **options):
        assert math.isclose(got, said, rel_tol=0.05)
