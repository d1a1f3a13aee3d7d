"""Bytes that engines send in the mocked world, against closed forms."""

from __future__ import annotations

from statistics import mean
from typing import Any

import pytest
from transformers import PreTrainedModel

from ds_ring.config import RunConfig
from ds_ring.engine.engine import Engine
from ds_ring.hf.dims import model_dims
from ds_ring.parallel.layout import SequenceLayout
from ds_ring.planning.comm_volume import bytes_sent_per_rank
from tests.helpers.mocked_world import serve
from tests.helpers.tiny_models import build, gpt_neox, llama_gqa, tokens


def run_config(**options: Any) -> RunConfig:
    return RunConfig.load({"dtype": "fp32"}, **options)


def traffic(model: PreTrainedModel, length: int, **options: Any) -> list[dict[str, int]]:
    """Bytes that each rank sends in one prefill for the last token, by operation."""

    def work(engine: Engine) -> dict[str, int]:
        batch, _ = engine.prepare(tokens(options["batch_size"], length), None, None)
        engine.mesh.traffic.bytes_by_op.clear()
        engine.prefill(batch, "last")
        return dict(engine.mesh.traffic.bytes_by_op)

    return serve(model, work, max_length=length, **options)


@pytest.mark.parametrize("ring_impl", ["zigzag", "contiguous"])
@pytest.mark.parametrize("ring_variant", ["gather_kv", "pass_kv"])
def test_ring_traffic(ring_impl, ring_variant):
    ring, sequences, length = 4, 3, 101
    options = {"ring_degree": ring, "ring_impl": ring_impl, "ring_variant": ring_variant, "batch_size": sequences}
    sent = traffic(build(llama_gqa()), length, micro_batch_size=2, **options)
    padded = SequenceLayout(length, ring, 1, ring_impl).padded_length
    layers, kv_heads, head_dim = 3, 3, 8
    token = 2 * kv_heads * head_dim * 4  # a key and a value in fp32
    if ring_impl == "zigzag":
        # Later ranks see this rank's first chunk, earlier ones both: their last chunk lies behind everything of ours.
        tokens_sent = [padded // (2 * ring) * ((ring - 1 - rank) + 2 * rank) for rank in range(ring)]
    else:
        tokens_sent = [padded // ring * (ring - 1 - rank) for rank in range(ring)]
    expected = [layers * sequences * token * n for n in tokens_sent]
    assert [s["exchange"] for s in sent] == expected
    assert not any(s.get("all_to_all") for s in sent)
    assert mean(expected) == bytes_sent_per_rank(run_config(**options), model_dims(llama_gqa()), sequences, length, 4)


@pytest.mark.parametrize(("kv_heads", "replicated"), [(8, 8), (4, 4), (2, 4), (1, 4)])
def test_ulysses_traffic(kv_heads, replicated):
    degree, heads, head_dim, sequences, length, layers = 4, 8, 6, 3, 101, 3
    config = llama_gqa(hidden_size=heads * head_dim, num_attention_heads=heads, num_key_value_heads=kv_heads)
    options = {"ulysses_degree": degree, "batch_size": sequences}
    sent = traffic(build(config), length, micro_batch_size=2, **options)
    local = -(-length // degree)
    # q and out whole, k and v with every head that some rank lacks; a quarter of it stays.
    elements = local * head_dim * (2 * heads + 2 * replicated) * (degree - 1) // degree
    assert [s["all_to_all"] for s in sent] == [layers * sequences * elements * 4] * degree
    assert sum(sum(s.values()) for s in sent) == degree * layers * sequences * elements * 4
    assert (
        bytes_sent_per_rank(run_config(**options), model_dims(config), sequences, length, 4)
        == layers * sequences * elements * 4
    )


def test_hybrid_traffic_is_the_plan():
    options = {"ulysses_degree": 2, "ring_degree": 2, "batch_size": 2}
    sent = traffic(build(gpt_neox(heads=4, layers=2)), 101, **options)
    planned = bytes_sent_per_rank(run_config(**options), model_dims(gpt_neox(heads=4, layers=2)), 2, 101, 4)
    assert mean(sum(s.values()) for s in sent) == planned


def test_pipeline_traffic():
    stages, sequences, length, hidden = 4, 3, 101, 32
    options = {"pp_size": stages, "batch_size": sequences}
    sent = traffic(build(gpt_neox(heads=4, layers=5)), length, micro_batch_size=2, **options)
    state = sequences * length * hidden * 4
    assert [sum(s.values()) for s in sent] == [state, state, state, 0]
    dims = model_dims(gpt_neox(heads=4, layers=5))
    assert mean([state, state, state, 0]) == bytes_sent_per_rank(run_config(**options), dims, sequences, length, 4)


@pytest.mark.parametrize("layout", [{"ring_degree": 4}, {"ulysses_degree": 2, "ring_degree": 2}], ids=str)
def test_a_decode_step_gathers_one_small_result_a_layer(layout):
    sequences, heads, head_dim, layers, vocabulary = 3, 6, 8, 3, 97
    config = llama_gqa(hidden_size=48, num_attention_heads=heads, num_key_value_heads=2)

    def work(engine: Engine) -> dict[str, int]:
        found = []
        for new in (2, 5):
            engine.mesh.traffic.bytes_by_op.clear()
            engine.generate(
                tokens(sequences, 21), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=None
            )
            found.append(dict(engine.mesh.traffic.bytes_by_op))
        return {name: longer - found[0][name] for name, longer in found[1].items()}

    for rank, sent in enumerate(serve(build(config), work, batch_size=sequences, **layout)):
        partial = sequences * heads * (head_dim + 1) * 4  # a result and its log-sum-exp in fp32
        assert sent["all_gather"] == 3 * layers * partial * 3
        assert sent["broadcast"] == (3 * sequences * vocabulary * 4 * 3 if rank == 0 else 0)
        assert sent["exchange"] == sent.get("all_to_all", 0) == 0
