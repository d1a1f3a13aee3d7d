"""Both kinds of engine over worlds of 4 and 8 ranks, held against the unsharded transformers model."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

import ds_ring
from ds_ring import api
from ds_ring.api import build_engine
from ds_ring.config import RunConfig
from ds_ring.engine.engine import Engine
from ds_ring.engine.model_runner import Shard
from ds_ring.hf.decoder import Decoder
from ds_ring.hf.dims import model_dims
from tests.helpers.mocked_world import one_process, relative_error, serve
from tests.helpers.process_group_world import ProcessGroupWorld
from tests.helpers.tiny_models import VOCAB, build, gpt_neox, logits, tokens

TOLERANCE = 1e-5
"""On the worst token's relative error, fp32 against fp32. The model itself in fp32 is 3e-6 away from fp64."""

EIGHT = {
    "dp2_ulysses2_ring2": {"dp_size": 2, "ulysses_degree": 2, "ring_degree": 2},
    "dp2_tp2_pp2": {"dp_size": 2, "tp_size": 2, "pp_size": 2},
}
FOUR = {
    "ulysses2_ring2": {"ulysses_degree": 2, "ring_degree": 2},
    "tp2_pp2": {"tp_size": 2, "pp_size": 2},
}


def by_name(layouts: dict[str, dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("layout", layouts.values(), ids=layouts.keys())


@cache
def small_model() -> PreTrainedModel:
    return build(gpt_neox(heads=4, layers=2))


@by_name(FOUR)
def test_the_public_entry_point_runs_unchanged_on_every_rank(layout, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    models = [build(gpt_neox(heads=4, layers=2)) for _ in range(4)]

    def work(rank: int) -> Tensor:
        engine = ds_ring.init_inference(models[rank], {"dtype": "fp32"}, **layout)
        return engine(tokens(1, 63)).logits

    with one_process():
        results = ProcessGroupWorld(4).run(work)
    want = logits(small_model(), tokens(1, 63))
    assert max(relative_error(got, want) for got in results) < TOLERANCE


def test_a_model_keeps_its_dtype_unless_a_configuration_says_otherwise(monkeypatch):
    monkeypatch.setattr(api, "connect", lambda run, model: None)
    monkeypatch.setattr(api, "build_engine", lambda model, run, *_: run)
    half = build(gpt_neox(heads=4, layers=2)).half()
    for config in (None, {}, RunConfig.load({}), RunConfig.load({}, max_length=5)):
        assert ds_ring.init_inference(half, config).dtype == "fp16"
    for config in ({"dtype": "bf16"}, RunConfig.load({"dtype": "bf16"})):
        assert ds_ring.init_inference(half, config).dtype == "bf16"


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@by_name(EIGHT)
def test_rows_that_do_not_divide_over_replicas(layout, micro_batch_size):
    ids = tokens(5, 101)
    results = serve(
        small_model(), lambda engine: engine(ids).logits, batch_size=5, micro_batch_size=micro_batch_size, **layout
    )
    assert len(results) == 8
    want = logits(small_model(), ids)
    assert max(relative_error(got, want) for got in results) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right", "mixed"])
@by_name(FOUR | EIGHT)
def test_padded_rows_equal_each_row_alone(layout, side):
    ids, mask = padded_batch([101, 37, 1, 80, 64], side)
    results = serve(small_model(), lambda engine: engine(ids, mask).logits, batch_size=5, micro_batch_size=2, **layout)
    everyone_alone = rows_alone(ids, mask)
    for got in results:
        for sequence, alone in enumerate(everyone_alone):
            assert relative_error(got[sequence][mask[sequence]], alone) < TOLERANCE
        assert not got[~mask].any(), "padding has logits of 0"


@pytest.mark.parametrize("side", ["left", "right"])
@by_name(FOUR)
def test_logits_to_keep_takes_the_last_columns(layout, side):
    ids, mask = padded_batch([101, 37, 1, 98], side)

    def work(engine: Engine) -> tuple[Tensor, dict[int, Tensor]]:
        return engine(ids, mask).logits, {keep: engine(ids, mask, logits_to_keep=keep).logits for keep in (1, 7)}

    for every, kept in serve(small_model(), work, batch_size=4, micro_batch_size=3, **layout):
        for keep, last in kept.items():
            assert last.shape == (4, keep, every.shape[2])
            torch.testing.assert_close(last, every[:, -keep:], rtol=1e-4, atol=1e-4)


@by_name(FOUR)
def test_position_ids_of_the_caller_are_used(layout):
    # With a mask: without one, transformers takes steps other than 1 for the seams of packed sequences.
    ids, mask, positions = tokens(1, 101), torch.ones(1, 101), torch.arange(101)[None] * 3 + 5
    with torch.inference_mode():
        want = small_model()(ids, mask, position_ids=positions, use_cache=False).logits
    for got in serve(small_model(), lambda engine: engine(ids, mask, positions).logits, **layout):
        assert relative_error(got, want) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
@by_name(FOUR | EIGHT)
def test_every_token_is_scored_once(layout, side, monkeypatch):
    monkeypatch.setattr("ds_ring.engine.scoring.LOGIT_ELEMENTS", 16 * VOCAB)
    ids, mask = padded_batch([101, 37, 1, 80, 64], side)
    results = serve(
        small_model(),
        lambda engine: engine.score(ids, mask).log_probs,
        batch_size=5,
        micro_batch_size=2,
        **layout,
    )
    everyone_alone = rows_alone(ids, mask)
    for scores in results:
        assert [len(s) for s in scores] == [100, 36, 0, 79, 63]
        for sequence, alone in enumerate(everyone_alone):
            following = ids[sequence][mask[sequence]][1:, None]
            want = log_softmax(alone[:-1].double(), dim=-1).gather(1, following)[:, 0]
            torch.testing.assert_close(scores[sequence].double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("wanted", ["none", "last", "all"])
@by_name(FOUR)
def test_prefill_leaves_results_where_they_are_made(layout, wanted):
    ids, length = tokens(3, 101), 101

    def work(engine: Engine) -> list[Shard]:
        batch, _ = engine.prepare(ids, None, None)
        return engine.prefill(batch, wanted, want_hidden=True)

    results = serve(small_model(), work, batch_size=3, micro_batch_size=2, **layout)
    hidden, whole = final_hidden(small_model(), ids), logits(small_model(), ids)
    # Tensor-parallel ranks of the last stage all hold the same result.
    copies = layout.get("tp_size", 1)
    for number, sequences in enumerate([slice(0, 2), slice(2, 3)]):
        shards = [shards[number] for shards in results]
        held = sorted(p for s in shards for p in s.positions_T.tolist() if p < length)
        assert held == sorted(list(range(length)) * copies)
        expected = {"none": [], "last": [length - 1], "all": list(range(length))}[wanted]
        assert sorted(p for s in shards for p in s.kept_k.tolist()) == sorted(expected * copies)
        for shard in shards:
            if shard.hidden_BTd is not None:
                real = [i for i, p in enumerate(shard.positions_T.tolist()) if p < length]
                at = shard.positions_T[real]
                assert relative_error(shard.hidden_BTd[:, real], hidden[sequences][:, at]) < TOLERANCE
            if len(shard.kept_k):
                assert relative_error(shard.logits_BkV, whole[sequences][:, shard.kept_k]) < TOLERANCE


@by_name(FOUR)
def test_two_models_with_other_head_counts_do_not_meet(layout):
    ids = tokens(1, 101)
    others = [build(gpt_neox(heads=6, layers=3), seed=1) for _ in range(4)]
    want_first, want_second = logits(small_model(), ids), logits(others[0], ids)

    def work(engine: Engine) -> list[Tensor]:
        model = others[engine.mesh.rank]
        second = build_engine(model, engine.run_config, engine.mesh, model_dims(model.config), engine.device)
        return [e(ids).logits for e in (engine, second, engine)]

    for first, second, again in serve(small_model(), work, **layout):
        assert relative_error(first, want_first) < TOLERANCE
        assert relative_error(second, want_second) < TOLERANCE
        assert torch.equal(first, again)


def padded_batch(lengths: list[int], side: str) -> tuple[Tensor, Tensor]:
    """Ids and a boolean mask [rows, longest + 2]; under padding stand tokens that must not count."""
    columns = max(lengths) + 2
    mask = torch.zeros(len(lengths), columns, dtype=torch.bool)
    for sequence, n in enumerate(lengths):
        left = side == "left" or (side == "mixed" and sequence % 2 == 0)
        mask[sequence, columns - n if left else 0 : columns if left else n] = True
    return tokens(len(lengths), columns), mask


def rows_alone(ids: Tensor, mask: Tensor) -> list[Tensor]:
    return [logits(small_model(), ids[sequence : sequence + 1, mask[sequence]])[0] for sequence in range(len(ids))]


def final_hidden(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return Decoder.of(model).module(ids, use_cache=False).last_hidden_state
