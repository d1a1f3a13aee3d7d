"""The planner: what it takes for which batch, length and memory, and that it never takes what cannot run."""

import json
import logging
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig

from ds_ring import api
from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError
from ds_ring.model_dims import ModelDims
from ds_ring.planning.cards import CARDS, Card
from ds_ring.planning.plan import Plan, best_of, plans, with_planned_degrees
from ds_ring.planning.validation import check_run

ROOT = Path(__file__).parents[2]
H100 = CARDS["H100"]
PAPER = ModelDims("gpt_neox", 4, 8192, 16, 16, 512, 32768, 256, 131072)
PAPER_WEIGHTS = 4 * 12 * 8192**2
LLAMA = ModelDims("llama", 80, 8192, 64, 8, 128, 28672, 128256, 131072)
LLAMA_WEIGHTS = 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672)


def choose_layout(run: RunConfig, dims: ModelDims, weights: int, ranks: int, card: Card) -> tuple[Plan, str]:
    return best_of(plans(run, dims, weights, ranks, card), ranks, card)


def run(batch: int, length: int, micro: int = 1) -> RunConfig:
    return RunConfig.load({"dtype": "fp16"}, batch_size=batch, max_length=length, micro_batch_size=micro)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_a_sequence_for_every_rank_makes_replicas(ranks):
    best, reason = choose_layout(run(4 * ranks, 10_000), PAPER, PAPER_WEIGHTS, ranks, H100)
    assert best.config.parallel.dp_size == ranks
    assert best.exposed_s == 0
    assert "no communication" in reason


def test_one_long_sequence_is_shared_by_all():
    best, reason = choose_layout(run(1, 131_072), PAPER, PAPER_WEIGHTS, 4, H100)
    assert best.config.topology.sp == 4
    assert "1 sequence for 4 ranks, so 4 share each" in reason
    alone, _ = choose_layout(run(1, 131_072), PAPER, PAPER_WEIGHTS, 1, H100)
    assert 2 < alone.step_s / best.step_s < 4


def ring2(batch: int, length: int, card: Card = H100, **options: Any) -> Plan:
    work = RunConfig.load(run(batch, length, micro=2), **options)
    return next(p for p in plans(work, PAPER, PAPER_WEIGHTS, 2, card) if p.label == "ring2")


def test_micro_batches_go_together_where_links_may_sleep_meanwhile():
    """A layer of two sequences takes some 28 ms here, of which transfers keep 1 busy and 50 awake."""
    together, by_three = ring2(32, 10_000), ring2(32, 10_000, in_flight=3)
    assert together.config.ring.in_flight in (8, 16)
    assert together.exposed_s < 0.5 * by_three.exposed_s
    assert together.memory_gib > by_three.memory_gib + 5


@pytest.mark.parametrize(
    ("batch", "length", "card", "options"),
    [
        (4, 10_000, H100, {}),  # there are no more than two
        (32, 1000, H100, {}),  # a layer of sixteen is shorter than what links stay awake
        (32, 10_000, replace(H100, memory_gib=12), {}),
        (32, 10_000, replace(H100, per_host=1), {}),  # by process groups
        (32, 10_000, H100, {"interleave": "off"}),
        (32, 10_000, H100, {"transport": "process_group"}),
    ],
)
def test_two_are_in_flight_where_more_win_nothing_or_do_not_fit(batch, length, card, options):
    assert ring2(batch, length, card, **options).config.ring.in_flight == 2


def test_few_sequences_are_shared_by_some():
    best, _ = choose_layout(run(2, 100_000), PAPER, PAPER_WEIGHTS, 4, H100)
    assert (best.config.parallel.dp_size, best.config.topology.sp) == (2, 2)


def test_weights_that_do_not_fit_are_cut():
    best, reason = choose_layout(run(8, 4096), LLAMA, LLAMA_WEIGHTS, 8, H100)
    assert best.config.topology.tp * best.config.topology.pp > 1
    assert "as the weights do not fit on one rank" in reason
    with pytest.raises(
        ConfigError, match=r"no layout of 1 ranks fits 79\.0 GiB a rank: single comes closest with \d+\.\d GiB"
    ):
        choose_layout(run(8, 4096), LLAMA, LLAMA_WEIGHTS, 1, H100)


def test_heads_that_do_not_divide_go_by_ring():
    odd = replace(PAPER, num_heads=9, num_kv_heads=3, hidden_size=9 * 512, head_dim=512)
    found = plans(run(1, 50_000), odd, 10**9, 4, H100)
    assert {p.config.parallel.ulysses_degree for p in found} == {1}


def test_ulysses_and_tensor_groups_stay_inside_a_host():
    for plan in plans(run(1, 100_000), PAPER, PAPER_WEIGHTS, 16, H100):
        assert plan.config.parallel.ulysses_degree <= H100.per_host
        assert plan.config.tp_size <= H100.per_host


@pytest.mark.parametrize("ranks", [1, 2, 3, 6, 16])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_all_that_is_offered_can_run_and_is_sorted(ranks, batch):
    found = plans(run(batch, 9_999), PAPER, PAPER_WEIGHTS, ranks, H100)
    assert len({plan.label for plan in found}) == len(found)
    for plan in found:
        check_run(plan.config, PAPER, ranks)
        assert math.isfinite(plan.step_s)
        assert 0 <= plan.exposed_s < plan.step_s
    fitting = [plan.step_s for plan in found if plan.fits]
    assert fitting == sorted(fitting)


def test_more_tokens_take_longer_and_more_memory():
    short, long = (plans(run(1, n), PAPER, PAPER_WEIGHTS, 1, H100)[0] for n in (10_000, 100_000))
    assert long.step_s > 10 * short.step_s  # attention grows faster than the length
    assert long.memory_gib > short.memory_gib


LONG = replace(PAPER, max_positions=1 << 20)


def ring_of_two(block_tokens: int, **options: int) -> Plan:
    config = RunConfig.load(run(1, 1_000_000), block_tokens=block_tokens, **options)
    return next(p for p in plans(config, LONG, PAPER_WEIGHTS, 2, H100) if p.label == "ring2")


def test_a_million_tokens_fit_on_two_where_layers_run_in_blocks():
    """The sum in ``memory``'s docstring, and what it would be with every intermediate whole."""
    assert ring_of_two(65_536).fits
    assert ring_of_two(65_536).memory_gib == pytest.approx(68.0, abs=0.05)
    assert not ring_of_two(0).fits
    assert ring_of_two(0).memory_gib == pytest.approx(98.5, abs=0.05)
    assert not plans(run(1, 1_000_000), LONG, PAPER_WEIGHTS, 1, H100)[0].fits


def test_memory_of_usual_shapes_does_not_depend_on_blocks():
    whole, blocked = (
        plans(RunConfig.load(run(8, 10_000, 2), block_tokens=n), PAPER, PAPER_WEIGHTS, 2, H100) for n in (0, 65_536)
    )
    assert [p.memory_gib for p in whole] == [p.memory_gib for p in blocked]


def test_the_script_prints_a_plan():
    command = [sys.executable, "launch/plan.py", "--model", "ds_configs/models/paper.json"]
    command += ["--ranks", "16", "--batch-size", "1024", "--max-length", "10000", "--micro-batch-size", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["rows"][0]["layout"] == "dp16"
    assert {"tp8_pp2", "ring16", "ulysses8_ring2"} <= {row["layout"] for row in document["rows"]}
    assert document["chosen"]["ds_ring"]["parallel"]["dp_size"] == 16
    assert document["chosen"]["dtype"] == "fp16"  # the model file's own


SMALL = GPTNeoXConfig(
    hidden_size=64, num_attention_heads=4, intermediate_size=128, num_hidden_layers=2, vocab_size=100,
    max_position_embeddings=4096,
)  # fmt: skip


def test_auto_in_a_configuration_becomes_degrees(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "ds_ring")
    config = RunConfig.load({"ds_ring": {"parallel": "auto", "workload": {"batch_size": 4}}})
    assert config.parallel.auto
    monkeypatch.setenv("WORLD_SIZE", "4")
    found = api.with_planned_degrees(config, SMALL)
    assert (found.parallel.auto, found.parallel.dp_size) == (False, 4)
    assert "parallel=auto takes dp4: 4 sequences keep 4 ranks busy" in caplog.text
    assert api.with_planned_degrees(found, SMALL) is found


def test_auto_keeps_what_is_not_a_degree():
    config = RunConfig.load({"ds_ring": {"parallel": "auto"}}, ring_impl="contiguous", max_length=4000)
    found, _ = with_planned_degrees(config, SMALL, 4, H100)
    assert found.parallel.ring_impl == "contiguous"
    assert found.topology.world_size == 4
    assert found.topology.dp == 1


def test_generation_shares_layers_only_where_they_do_not_fit():
    """One short prompt, of which a pipeline's prefill is the fastest."""
    config = RunConfig.load({"dtype": "fp16", "ds_ring": {"parallel": "auto"}}, max_length=60)
    prefill, _ = with_planned_degrees(config, SMALL, 2, H100)
    assert prefill.topology.tp * prefill.topology.pp == 2
    found, reason = with_planned_degrees(config, SMALL, 2, H100, generating=True)
    assert found.topology.sp == 2
    assert "so 2 share each" in reason
    large = LlamaConfig(
        hidden_size=8192, num_attention_heads=64, num_key_value_heads=8, intermediate_size=28672, num_hidden_layers=48,
        vocab_size=32000,
    )  # fmt: skip
    found, reason = with_planned_degrees(config, large, 2, H100, generating=True)
    assert found.topology.tp * found.topology.pp == 2
    assert "the weights do not fit on one rank" in reason


def test_a_cache_has_to_fit_as_well():
    """One prompt of 130,000 tokens: its cache is half as large as the weights."""
    model = LlamaConfig(
        hidden_size=4096, num_attention_heads=32, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000,
        max_position_embeddings=200_000,
    )  # fmt: skip
    config = RunConfig.load({"dtype": "bf16", "ds_ring": {"parallel": "auto"}}, max_length=130_000, prefill_chunk=8192)
    with pytest.raises(ConfigError, match=r"no layout of 1 ranks fits 79\.0 GiB a rank: single comes closest with 7"):
        with_planned_degrees(config, model, 1, H100, generating=True)
    with_planned_degrees(RunConfig.load(config, max_length=60_000), model, 1, H100, generating=True)


def test_a_length_that_the_model_lacks_is_the_reason():
    """And not how few sequences there are for replicas."""
    config = RunConfig.load({"ds_ring": {"parallel": "auto"}}, max_length=5000)
    with pytest.raises(ConfigError, match="can run this: max_length=5000 exceeds the model"):
        with_planned_degrees(config, GPT2Config(n_positions=4096), 16, H100)


def test_other_implementations_are_not_planned():
    config = RunConfig.load({"ds_ring": {"parallel": "auto"}}, implementation="yunchang")
    with pytest.raises(ConfigError, match=r"implementation=yunchang: only ds_ring's layouts are planned"):
        with_planned_degrees(config, SMALL, 4, H100)


def test_auto_beside_a_degree_is_refused():
    config = RunConfig.load({"ds_ring": {"parallel": {"auto": True, "ring_degree": 2}}})
    with pytest.raises(ConfigError, match=r"parallel=auto chooses every degree, but ring2 is given as well"):
        with_planned_degrees(config, SMALL, 2, H100)
