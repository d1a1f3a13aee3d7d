"""A step's terms, each by its own arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.planner.cases import model_of
from ds_ring.config import RunConfig
from ds_ring.planning.cards import CARDS, Card
from ds_ring.planning.compute_time import mean_keys
from ds_ring.planning.rates import Rates
from ds_ring.planning.step_time import StepTime, step_time

DIMS, PARAMETERS = model_of("paper")
H100 = CARDS["H100"]
RATES = H100.rates
LINK, NETWORK = H100.link_bytes, H100.network_bytes * RATES.network_reached
HIDDEN = 32 * 10_000 * 8192 * 2
"""Bytes of all sequences' hidden states."""


def step(card: Card = H100, **options: Any) -> StepTime:
    work = {"batch_size": 32, "max_length": 10_000, "micro_batch_size": 2} | options
    return step_time(RunConfig.load({"dtype": "fp16"}, **work), DIMS, PARAMETERS, card)


def test_one_rank_only_computes():
    alone = step()
    assert alone.exposed == pytest.approx(0)
    assert alone.products == pytest.approx(
        2 * PARAMETERS * 320_000 * (1 + RATES.few_rows / 20_000) / H100.product_flops
    )
    assert alone.memory == pytest.approx(RATES.passes * 4 * HIDDEN / H100.memory_bytes)
    assert step(dp_size=2, batch_size=64) == alone


def test_all_reduces_that_nothing_hides():
    found, sent = step(tp_size=2), 2 * 4 * HIDDEN
    took = sent / (LINK * RATES.all_reduce_of_two) + 2 * 4 * 16 * RATES.all_reduce_start_s
    assert found.waits_near == pytest.approx(took, rel=1e-3)  # and the last tokens' logits
    assert found.cooler == pytest.approx(-(1 - RATES.waiting) * took, rel=1e-3)
    assert found.memory == step().memory
    assert (found.waits_far, found.beside, found.bubble) == (0, 0, 0)


def test_all_reduces_under_another_micro_batch_cost_a_share_of_their_time():
    alone, in_flight = step(tp_size=2), step(tp_size=2, interleave="on")
    assert in_flight.waits_near == 0
    assert in_flight.beside == pytest.approx(RATES.beside_nccl * alone.waits_near)
    assert in_flight.total < alone.total


def test_links_that_are_awake_all_the_time_and_those_that_sleep_between_layers():
    two, sixteen = (step(ring_degree=2, in_flight=lanes) for lanes in (2, 16))
    computed = two.products + two.attention + two.memory
    busy = 2 / 1.5 * 0.375 * 4 * 2 * HIDDEN / LINK + 4 * 16 * RATES.message_s
    assert two.awake == pytest.approx(RATES.awake * computed)
    assert sixteen.awake == pytest.approx(RATES.awake * (busy + 4 * RATES.link_sleeps_s))


def test_a_pipelines_bubble_is_a_stages_work_on_one_micro_batch():
    found = step(pp_size=4, micro_batch_size=1)
    stage = found.products + found.attention + found.memory + found.awake + found.beside + found.cooler
    assert found.bubble == pytest.approx(3 / 32 * stage)
    assert found.waits_near == pytest.approx(3 / 32 * (HIDDEN / LINK + 32 * RATES.message_s))


def test_stages_between_hosts_hand_on_by_nccl():
    near, far = step(pp_size=2), step(replace(H100, per_host=1), pp_size=2)
    computed = near.products + near.attention + near.memory
    assert far.beside == pytest.approx(RATES.receiving * computed)
    assert far.awake == near.beside == 0
    assert far.waits_far == pytest.approx((HIDDEN / NETWORK + 16 * RATES.network_message_s) / 16)


def test_a_ring_between_hosts_waits_for_the_rank_that_receives_most():
    found = step(replace(H100, per_host=1), ring_degree=2)
    received = 4 * 0.5 * 2 * HIDDEN  # both chunks of the other rank, keys and values of four layers
    assert found.waits_far == pytest.approx(received / NETWORK + 4 * 16 * RATES.network_message_s)
    assert found.awake == 0


def test_a_wait_gives_back_no_more_than_the_highest_clock():
    found = step(replace(H100, per_host=1, network_bytes=1e9), ring_degree=2)
    computed = found.products + found.attention + found.memory
    assert found.cooler == pytest.approx(-(1 - RATES.highest_clock) * computed)


def test_the_fullest_stage_counts():
    dims = replace(DIMS, num_layers=5)
    run = RunConfig.load({"dtype": "fp16"}, batch_size=32, max_length=10_000, pp_size=2)
    alone = step_time(RunConfig.load(run, pp_size=1), dims, PARAMETERS, H100)
    assert step_time(run, dims, PARAMETERS, H100).products == pytest.approx(3 / 5 * alone.products)


def test_a_contiguous_rings_last_rank_has_most_to_attend_to():
    zigzag, contiguous = (step(ring_degree=2, ring_impl=impl) for impl in ("zigzag", "contiguous"))
    assert contiguous.attention == pytest.approx(1.5 * zigzag.attention, rel=0.02)


@pytest.mark.parametrize(
    ("length", "window", "keys"), [(100, None, 50), (100, 100, 50), (100, 200, 50), (100, 10, 9.5)]
)
def test_keys_that_a_query_sees(length, window, keys):
    assert mean_keys(length, window) == keys


def test_a_cpu_has_no_clock_to_win_and_no_links_to_wake():
    found = step(CARDS["CPU"], ring_degree=2)
    assert (found.awake, found.cooler) == (0, 0)
    assert CARDS["CPU"].rates != Rates()
