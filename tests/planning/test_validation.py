"""The rules of a run, and the exact words with which a broken one is refused."""

import re
from dataclasses import replace
from typing import Any

import pytest

from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError, UnsupportedModelError, UserError
from ds_ring.parallel.degrees import stage_layers, valid_degrees
from ds_ring.planning.validation import check_run
from tests.helpers.shapes import SHAPE, check


def refused(text: str) -> Any:
    """Expect a ConfigError of exactly this text."""
    return pytest.raises(ConfigError, match=f"^{re.escape(text)}$")


class TestChecks:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"tp_size": 4, "pp_size": 4},
            {"ulysses_degree": 14, "ring_degree": 3},
            {"dp_size": 2, "ring_degree": 2, "batch_size": 3},
            {"pp_size": 3},
            {"max_length": 4096},
        ],
        ids=str,
    )
    def test_runs_that_fit_pass(self, options):
        config = RunConfig.load(None, **options)
        assert check_run(config, SHAPE, config.topology.world_size) is None

    @pytest.mark.parametrize(
        ("num_heads", "degree", "text"),
        [
            (28, 8, "num_heads=28 is not divisible by ulysses_degree=8; try 2, 4, 7, 14 or 28"),
            (9, 2, "num_heads=9 is not divisible by ulysses_degree=2; try 3 or 9"),
            (7, 2, "num_heads=7 is not divisible by ulysses_degree=2; try 7"),
            (1, 2, "num_heads=1 is not divisible by ulysses_degree=2; use ring_degree instead"),
        ],
    )
    def test_heads_that_do_not_divide_over_ulysses_ranks(self, num_heads, degree, text):
        with refused(text):
            check(replace(SHAPE, num_heads=num_heads, num_kv_heads=1), ulysses_degree=degree)

    def test_fewer_kv_heads_than_ulysses_ranks_are_fine(self):
        check(replace(SHAPE, num_kv_heads=1), ulysses_degree=28)
        with pytest.raises(ConfigError):
            check(replace(SHAPE, num_kv_heads=1), tp_size=28)

    @pytest.mark.parametrize(
        ("change", "tp_size", "text"),
        [
            ({"num_heads": 30, "num_kv_heads": 6}, 4, "num_heads=30 is not divisible by tp_size=4; try 2"),
            ({}, 7, "num_kv_heads=4 is not divisible by tp_size=7; try 2 or 4"),
            ({"num_kv_heads": 1}, 2, "num_kv_heads=1 is not divisible by tp_size=2; use pp_size instead"),
            ({"intermediate_size": 1026}, 4, "intermediate_size=1026 is not divisible by tp_size=4; try 2"),
            ({"hidden_size": 510}, 4, "hidden_size=510 is not divisible by tp_size=4; try 2"),
        ],
    )
    def test_what_tensor_parallel_cannot_cut(self, change, tp_size, text):
        with refused(text):
            check(replace(SHAPE, **change), tp_size=tp_size)

    def test_more_stages_than_layers(self):
        with refused("pp_size=5 is more than the model's 4 layers; take at most 4"):
            check(pp_size=5)

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            (
                {"ring_degree": 2, "tp_size": 2},
                "ring_degree=2 x ulysses_degree=1 cannot be combined with tp_size=2 x pp_size=1: a replica is either "
                "sequence parallel or tensor x pipeline parallel; set one pair to 1",
            ),
            (
                {"ulysses_degree": 4, "pp_size": 2},
                "ring_degree=1 x ulysses_degree=4 cannot be combined with tp_size=1 x pp_size=2: a replica is either "
                "sequence parallel or tensor x pipeline parallel; set one pair to 1",
            ),
        ],
    )
    def test_sequence_parallel_with_tensor_or_pipeline_parallel(self, options, text):
        with refused(text):
            check(**options)

    @pytest.mark.parametrize("world_size", [1, 8, 32])
    def test_degrees_that_do_not_multiply_to_the_world(self, world_size):
        with refused(
            "dp_size=2 x pp_size=1 x ring_degree=4 x ulysses_degree=2 x tp_size=1 = 16 ranks, but "
            f"{world_size} were launched; launch with --num_gpus 16 (ds-ring: --ranks 16) or change the degrees"
        ):
            check(dp_size=2, ring_degree=4, ulysses_degree=2, batch_size=2, world_size=world_size)

    def test_a_batch_smaller_than_the_replicas(self):
        with refused(
            "batch_size=3 leaves some of dp_size=4 replicas without a sequence; raise batch_size to 4 or lower dp_size"
        ):
            check(dp_size=4, batch_size=3)

    def test_a_sequence_longer_than_the_models_positions(self):
        with refused("max_length=4097 exceeds the model's max_position_embeddings=4096; shorten it"):
            check(max_length=4097)
        check(replace(SHAPE, max_positions=None), max_length=1 << 20)

    @pytest.mark.parametrize(
        ("sweep", "text"),
        [
            ([5000, 100], "sweep=5000 exceeds the model's max_position_embeddings=4096; shorten it"),
            ([100, 0], "ds_ring.benchmark.sweep=[100, 0]: Value error, each must be at least 1"),
            ([-3], "ds_ring.benchmark.sweep=[-3]: Value error, each must be at least 1"),
        ],
    )  # fmt: skip
    def test_a_length_of_the_sweep_that_cannot_run(self, sweep, text):
        with refused(text):
            check(sweep=sweep)

    def test_layers_that_cannot_be_sharded(self):
        shape = replace(SHAPE, layer_types=("full_attention", "linear_attention", "chunked_attention"))
        text = (
            "llama has layers of type chunked_attention, linear_attention; "
            "only full_attention, sliding_attention can be sharded"
        )
        with pytest.raises(UnsupportedModelError, match=f"^{re.escape(text)}$"):
            check(shape)
        check(replace(SHAPE, layer_types=("full_attention", "sliding_attention")))

    @pytest.mark.parametrize("kv_heads", [0, 3])
    def test_key_value_heads_that_do_not_divide(self, kv_heads):
        text = f"llama has num_heads=28, which its num_kv_heads={kv_heads} must divide"
        with pytest.raises(UnsupportedModelError, match=f"^{text}$"):
            check(replace(SHAPE, num_kv_heads=kv_heads))

    def test_every_refusal_is_the_users_to_put_right(self):
        assert issubclass(ConfigError, UserError)
        assert issubclass(UnsupportedModelError, UserError)


def test_valid_degrees_divide_every_count_and_leave_out_one():
    assert valid_degrees(28) == [2, 4, 7, 14, 28]
    assert valid_degrees(16, 8, 12) == [2, 4]
    assert valid_degrees(5, 3) == []
    assert valid_degrees(128, limit=16) == [2, 4, 8, 16]


class TestStageLayers:
    @pytest.mark.parametrize(
        ("num_layers", "pp_size", "counts"),
        [(4, 1, [4]), (4, 2, [2, 2]), (7, 2, [4, 3]), (7, 3, [3, 2, 2]), (5, 4, [2, 1, 1, 1]), (4, 4, [1] * 4)],
    )
    def test_earlier_stages_take_one_more(self, num_layers, pp_size, counts):
        assert [len(stage_layers(num_layers, pp_size, s)) for s in range(pp_size)] == counts

    @pytest.mark.parametrize("pp_size", range(1, 13))
    @pytest.mark.parametrize("num_layers", [12, 13, 23])
    def test_stages_hold_every_layer_once_in_order(self, num_layers, pp_size):
        stages = [stage_layers(num_layers, pp_size, s) for s in range(pp_size)]
        assert [layer for stage in stages for layer in stage] == list(range(num_layers))
        assert all(stages)
