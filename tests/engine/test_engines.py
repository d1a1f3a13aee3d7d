"""Both engines over worlds of up to 16 ranks, held against the unsharded transformers model."""

from __future__ import annotations

import math
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
from ds_ring.errors import DisagreementError, InputError, TransportError
from ds_ring.hf.decoder import Decoder
from ds_ring.hf.dims import model_dims
from ds_ring.transport.mesh import Mesh
from tests.helpers.mocked_world import ProcessGroupWorld, Wire, one_process, outcome, relative_error, serve
from tests.helpers.tiny_models import build, gpt_neox, logits, tokens

TOLERANCE = 1e-5
"""On the worst token's relative error, fp32 against fp32. The model itself in fp32 is 3e-6 away from fp64."""

RINGS = {
    "zigzag": {},
    "contiguous": {"ring_impl": "contiguous"},
    "zigzag_pass_kv": {"ring_variant": "pass_kv"},
    "contiguous_pass_kv": {"ring_impl": "contiguous", "ring_variant": "pass_kv"},
}
SIXTEEN = {
    f"{name}_{ring}": {"ulysses_degree": ulysses, "ring_degree": 16 // ulysses} | options
    for name, ulysses in {"ring16": 1, "ulysses2_ring8": 2, "ulysses4_ring4": 4, "ulysses8_ring2": 8}.items()
    for ring, options in RINGS.items()
} | {"ulysses16": {"ulysses_degree": 16}}
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
def paper_model() -> PreTrainedModel:
    return build(gpt_neox())


@cache
def small_model() -> PreTrainedModel:
    return build(gpt_neox(heads=4, layers=2))


@cache
def paper_logits(length: int) -> Tensor:
    return logits(paper_model(), tokens(1, length, seed=length))


@pytest.mark.parametrize("length", [63, 1001])
@by_name(SIXTEEN)
def test_sixteen_sequence_parallel_ranks_equal_one(layout, length):
    results = serve(
        paper_model(), lambda engine: engine(tokens(1, length, seed=length)).logits, max_length=length, **layout
    )
    assert len(results) == 16
    assert max(relative_error(got, paper_logits(length)) for got in results) < TOLERANCE


@pytest.mark.parametrize("length", [63, 1001])
def test_eight_tensor_by_two_pipeline_ranks_equal_one(length):
    results = serve(
        paper_model(),
        lambda engine: engine(tokens(1, length, seed=length)).logits,
        tp_size=8,
        pp_size=2,
        max_length=length,
    )
    assert len(results) == 16
    assert max(relative_error(got, paper_logits(length)) for got in results) < TOLERANCE


def test_eight_tensor_by_two_pipeline_ranks_hold_a_sixteenth_of_the_layers():
    def parts(engine: Engine) -> tuple[int, int]:
        layers = Decoder.of(engine.model).layers
        return len(layers), sum(p.numel() for p in layers.parameters() if p.dim() > 1)

    whole = sum(p.numel() for p in Decoder.of(paper_model()).layers.parameters() if p.dim() > 1)
    assert serve(paper_model(), parts, tp_size=8, pp_size=2) == [(2, whole // 16)] * 16


@pytest.mark.parametrize("ring_impl", ["zigzag", "contiguous"])
def test_sequence_parallelism_is_the_same_over_process_groups(ring_impl):
    options = {"ulysses_degree": 2, "ring_degree": 4, "ring_impl": ring_impl, "ring_variant": "pass_kv"}
    results = serve(
        paper_model(), lambda engine: engine(tokens(1, 63, seed=63)).logits, wire="process_groups", **options
    )
    assert max(relative_error(got, paper_logits(63)) for got in results) < TOLERANCE


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
    assert max(relative_error(got, logits(small_model(), tokens(1, 63))) for got in results) < TOLERANCE


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
    assert max(relative_error(got, logits(small_model(), ids)) for got in results) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right", "mixed"])
@by_name(FOUR | EIGHT)
def test_padded_rows_equal_each_row_alone(layout, side):
    ids, mask = padded_batch([101, 37, 1, 80, 64], side)
    results = serve(small_model(), lambda engine: engine(ids, mask).logits, batch_size=5, micro_batch_size=2, **layout)
    for got in results:
        for sequence, alone in enumerate(rows_alone(ids, mask)):
            assert relative_error(got[sequence][mask[sequence]], alone) < TOLERANCE
        assert not got[~mask].any(), "padding has logits of 0"


@pytest.mark.parametrize("keep", [1, 7])
@pytest.mark.parametrize("side", ["left", "right"])
@by_name(FOUR)
def test_logits_to_keep_takes_the_last_columns(layout, side, keep):
    ids, mask = padded_batch([101, 37, 1, 98], side)

    def work(engine: Engine) -> tuple[Tensor, Tensor]:
        return engine(ids, mask).logits, engine(ids, mask, logits_to_keep=keep).logits

    for every, last in serve(small_model(), work, batch_size=4, micro_batch_size=3, **layout):
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
    monkeypatch.setattr("ds_ring.engine.scoring.CHUNK", 16)
    ids, mask = padded_batch([101, 37, 1, 80, 64], side)
    results = serve(
        small_model(),
        lambda engine: engine.token_log_likelihoods(ids, mask),
        batch_size=5,
        micro_batch_size=2,
        **layout,
    )
    for scores in results:
        assert [len(s) for s in scores] == [100, 36, 0, 79, 63]
        for sequence, alone in enumerate(rows_alone(ids, mask)):
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


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (lambda ids: ids.flip(1), "digest"),
        (lambda ids: ids[:, 1:], r"\(1, 62\) tokens"),
        (lambda ids: ids + 1000, "token id 10.. is outside the vocabulary"),
    ],
    ids=["other tokens", "other length", "unusable tokens"],
)
@pytest.mark.parametrize("wire", ["threads", "process_groups"])
def test_other_input_on_one_rank_is_rejected_by_all(wire: Wire, alter, reason):
    ids = tokens(1, 63)

    def work(engine: Engine) -> Exception | None:
        return outcome(lambda: engine(alter(ids) if engine.mesh.rank == 2 else ids))

    errors = serve(small_model(), work, wire=wire, ring_degree=4)
    assert {type(error) for error in errors} == {DisagreementError}
    assert len({str(error) for error in errors}) == 1
    with pytest.raises(DisagreementError, match=f"ranks disagree on input_ids: rank 0 has .* rank 2 has .*{reason}"):
        raise errors[0]


def test_unusable_input_on_all_ranks_is_named_by_all():
    errors = serve(small_model(), lambda engine: outcome(lambda: engine(tokens(1, 63) + 1000)), ring_degree=4)
    assert {type(error) for error in errors} == {InputError}
    assert "outside the vocabulary of 97" in str(errors[0])


@by_name(EIGHT)
def test_fewer_rows_than_replicas_are_rejected_by_all(layout):
    errors = serve(
        small_model(), lambda engine: outcome(lambda: engine(tokens(1, 63))), batch_size=2, max_length=63, **layout
    )
    assert [type(e) for e in errors] == [InputError] * 8
    assert "dp_size=2" in str(errors[0])


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


def test_the_mocked_wire_shows_a_buffer_reused_or_read_too_early():
    def work(rank: int) -> list[float]:
        mesh = Mesh.from_process_groups(run_config(pp_size=2).topology)
        buffer = torch.ones(3)
        message = [(1 - rank, buffer)]
        pending = mesh["pp"].exchange(*((message, []) if rank == 0 else ([], message)))
        early = buffer.tolist()
        if rank == 0:
            buffer.zero_()
        mesh["world"].barrier()
        pending.wait()
        return early + buffer.tolist()

    with one_process():
        received = ProcessGroupWorld(2).run(work)[1]
    assert all(math.isnan(x) for x in received[:3])
    assert received[3:] == [0.0, 0.0, 0.0]


def test_the_mocked_wire_rejects_messages_of_unequal_shape():
    def work(rank: int) -> None:
        pp = Mesh.from_process_groups(run_config(pp_size=2).topology)["pp"]
        pp.exchange(*([(1, torch.ones(3))], []) if rank == 0 else ([], [(0, torch.ones(4))])).wait()

    with one_process(), pytest.raises(TransportError, match=r"\(3,\).*sent, \(4,\) expected"):
        ProcessGroupWorld(2).run(work)


@pytest.mark.parametrize("where", ["layers", "between"])
def test_the_mocked_world_raises_what_failed_first_and_stops_the_others(where):
    def work(engine: Engine) -> None:
        def fail(*args: object) -> None:
            raise ValueError("only here")

        if engine.mesh.rank == 3:
            if where == "between":
                fail()
            Decoder.of(engine.model).layers[-1].register_forward_hook(fail)
        engine(tokens(1, 63))

    with pytest.raises(ValueError, match="only here"):
        serve(small_model(), work, tp_size=2, pp_size=2)


def run_config(**options: Any) -> RunConfig:
    return RunConfig.load({"dtype": "fp32"}, **options)


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
