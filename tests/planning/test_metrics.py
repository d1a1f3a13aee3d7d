"""The figures of the paper's table, from their definitions."""

from dataclasses import replace

import pytest

from ds_ring.config import RunConfig
from ds_ring.hf.dims import model_dims
from ds_ring.hf.flops import layer_parameters, linear_parameters
from ds_ring.planning.comm_volume import bytes_sent_per_rank
from ds_ring.planning.metrics import Work
from ds_ring.utils.model_config import read_config

PAPER = "ds_configs/models/paper.json"


@pytest.fixture(scope="module")
def paper():
    config = read_config(PAPER)
    return Work(model_dims(config), linear_parameters(config), batch=1024, length=10_000)


def test_the_papers_model_has_the_papers_shape(paper):
    s = paper.dims
    assert (s.num_layers, s.num_heads, s.head_dim, s.hidden_size, s.intermediate_size) == (4, 16, 512, 8192, 32768)


def test_work_per_token_at_the_papers_shape(paper):
    d, length = 8192, 10_000
    assert paper.linear_parameters == 4 * 12 * d * d
    assert paper.flops_per_token == 4 * (24 * d * d + 2 * length * d)
    assert paper.flops_per_token == pytest.approx(7.10e9, rel=1e-3)


def test_prefill_only_counts_what_it_needs(paper):
    """Of the last layer's twelve d x d matrices two, K and V, for all tokens; the rest and attention for one a row."""
    d, length, batch = 8192, 10_000, 1024
    short = replace(paper, last_layer_parameters=12 * d * d)
    whole_layers, keys_values = 3 * (24 * d * d + 2 * length * d), 4 * d * d
    last_tokens = batch * (20 * d * d + 4 * length * d)
    assert short.flops_per_token * short.tokens == short.tokens * (whole_layers + keys_values) + last_tokens
    assert short.flops_per_token == pytest.approx(5.59e9, rel=1e-3)
    assert layer_parameters(read_config(PAPER)) == [12 * d * d] * 4


@pytest.mark.parametrize(("tps", "tpot_ms", "mfu"), [(1.20e6, 0.85, 0.538), (1.45e6, 0.70, 0.650)])
def test_the_papers_figures_follow_from_the_definitions(paper, tps, tpot_ms, mfu):
    seconds = paper.tokens / tps
    assert paper.tps(seconds) == pytest.approx(tps)
    assert paper.tpot_ms(seconds) == pytest.approx(tpot_ms, abs=0.01)
    assert paper.mfu(seconds, ranks=16, peak_flops=989e12) == pytest.approx(mfu, abs=0.001)


@pytest.mark.parametrize(
    ("file", "gib"),
    [
        # 4 layers x 2 all-reduces of 1024 x 10000 x 8192 x 2 bytes, 2 x 7/8 each, on half the layers; half the ranks
        # hand the hidden states on once.
        ("paper_tp8_pp2", (4 * 2 * 2 * 7 / 8 / 2 + 1 / 2) * 1024 * 10_000 * 8192 * 2 / 2**30),
        # 15 x 3/2 chunks of 313 tokens (10,000 padded to 10,016), K and V, 4 layers.
        ("paper_ring_sp16", 4 * 15 * 1.5 * 313 * 2 * 1024 * 8192 * 2 / 2**30),
        # All-to-all of q, k, v and out over 8 of 10,000 / 16 tokens each, and one ring hop of 2 of 16 heads.
        ("paper_ulysses8_ring2", 4 * (4 * 7 / 8 * 626 * 8192 + 1.5 * 2504 * 2 * 1024) * 2 * 1024 / 2**30),
        ("paper_dp16", 0),
    ],
)
def test_bytes_sent_at_the_papers_shape(paper, file, gib):
    config = RunConfig.load(f"ds_configs/{file}.json")
    sent = bytes_sent_per_rank(config, paper.dims, 1024, 10_000, itemsize=2) / 2**30
    assert sent == pytest.approx(gib, rel=3e-3)


def test_gated_layers_count_all_three_matrices(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2,'
        ' "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 10}'
    )
    attention, mlp = 64 * 64 * 2 + 64 * 16 * 2, 3 * 64 * 96
    assert linear_parameters(read_config(tmp_path)) == 3 * (attention + mlp)
