"""Whole forwards without communication, and the journal of one, in every kind of layout."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from greenlet import getcurrent, greenlet
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.communication.autotp import without_all_reduces
from benchmarks.communication.engines import muted, recorded
from ds_ring.attention import ring
from ds_ring.engine.engine import Engine
from ds_ring.transport.peer_buffers import BufferPool
from tests.helpers.generation import GREEDY
from tests.helpers.mocked_world import relative_error, serve
from tests.helpers.tiny_models import build, gpt_neox, llama_gqa, logits, tokens

TOLERANCE = 1e-5
LENGTH = 61
by_split = pytest.mark.parametrize("layout", [{"ring_degree": 4}, {"ulysses_degree": 4}], ids=str)


@cache
def small_model() -> PreTrainedModel:
    return build(gpt_neox(heads=4, layers=2))


@pytest.mark.parametrize("layout", [{"ring_degree": 4}, {"ulysses_degree": 4}, {"pp_size": 2, "tp_size": 2}], ids=str)
def test_a_muted_engine_talks_to_nobody(layout):
    ids = tokens(1, 63)

    def work(engine: Engine) -> Tensor:
        batch, _ = engine.prepare(ids, None, None)
        if engine.mesh.rank in (0, 3):
            # Were anything sent, these ranks would wait for the others.
            with muted(engine):
                engine.prefill(batch, "last")
        return engine(ids).logits

    results = serve(small_model(), work, **layout)
    assert max(relative_error(got, logits(small_model(), ids)) for got in results) < TOLERANCE


@by_split
def test_a_muted_prefill_only_talks_to_nobody(layout):
    ids = tokens(1, 63)

    def work(engine: Engine) -> Tensor:
        batch, _ = engine.prepare(ids, None, None)
        if engine.mesh.rank in (0, 3):
            with muted(engine):
                engine.prefill_only(batch)
        return engine.next_token_logits(ids)

    for got in serve(small_model(), work, **layout):
        assert relative_error(got, logits(small_model(), ids)[:, -1]) < TOLERANCE


@pytest.mark.parametrize(
    "layout",
    [{"ring_degree": 3}, {"ring_degree": 2, "ulysses_degree": 2}, {"pp_size": 2, "batch_size": 4}],
    ids=str,
)
def test_a_muted_forward_over_copy_engines_counts_as_much_and_moves_nothing(layout, monkeypatch):
    moved: list[str] = []
    for name in ("acquire", "publish", "pull"):
        method = getattr(BufferPool, name)
        monkeypatch.setattr(
            BufferPool, name, lambda *args, name=name, method=method: moved.append(name) or method(*args)
        )

    def work(engine: Engine) -> tuple[Any, ...]:
        batch, found = engine.prepare(tokens(4, LENGTH), None, None)[0], []

        def count() -> None:
            engine.mesh.traffic.bytes_by_op.clear()
            shards = engine.prefill(batch, "last")
            assert all(bool(s.logits_BkV.isfinite().all()) for s in shards if s.logits_BkV is not None)
            found.append(dict(engine.mesh.traffic.bytes_by_op))

        count()
        engine.meet()
        moved.clear()
        engine.meet()
        with muted(engine):
            count()
            engine.meet()
        return *found, len(moved)

    for loud, silent, moves in serve(build(gpt_neox(heads=4, layers=2)), work, wire="copy_engine", **layout):
        assert loud == silent
        assert sum(loud.values()) > 0 or "pp_size" in layout
        assert moves == 0


@pytest.mark.parametrize("ranks", [2, 3])
def test_muted_segments_apart_send_what_one_segment_sends(ranks, monkeypatch):
    """For kernels that take several segments, and for others; other numbers stand for those of other ranks in every
    layer."""

    def work(engine: Engine) -> tuple[Tensor, dict[str, int], set[int]]:
        engine.mesh.traffic.bytes_by_op.clear()
        with muted(engine):
            shards = engine.prefill(engine.prepare(tokens(3, LENGTH), None, None)[0], "all")
        found = torch.cat([shard.logits_BkV for shard in shards])
        return found, dict(engine.mesh.traffic.bytes_by_op), {len(segments) for segments in attended}

    attended: list[Any] = []
    attend = ring.attend_ranges
    monkeypatch.setattr(
        ring, "attend_ranges", lambda q, runs, keys, *rest: attended.append(keys) or attend(q, runs, keys, *rest)
    )
    options = {"wire": "copy_engine", "ring_degree": ranks, "ring_variant": "gather_kv"}
    model = build(gpt_neox(heads=4, layers=2))
    joined = serve(model, work, **options)
    assert all(counts == {1} for *_, counts in joined)
    attended.clear()
    monkeypatch.setattr(ring, "takes_segments", lambda *_: True)
    for (got, sent, counts), (_, want_sent, _) in zip(serve(model, work, **options), joined, strict=True):
        assert sent == want_sent
        assert min(counts) > 1
        assert got.isfinite().all()


def test_autotp_sums_nothing_inside_the_block_and_everything_after_it():
    ids = tokens(1, LENGTH)

    def work(engine: Engine) -> tuple[Tensor, Tensor]:
        with without_all_reduces(engine.model):
            alone = engine(ids).logits
        return alone, engine(ids).logits

    want = logits(small_model(), ids)
    for alone, summed in serve(small_model(), work, tp_size=2):
        assert relative_error(alone, want) > 0.1
        assert relative_error(summed, want) < TOLERANCE


@pytest.mark.parametrize(
    ("way", "layout"),
    [(muted, {"ring_degree": 2}), (recorded, {"ring_degree": 2}), (recorded, {"ulysses_degree": 2})],
    ids=["muted_ring", "recorded_ring", "recorded_ulysses"],
)
@pytest.mark.parametrize(("rows", "in_flight"), [(2, 2), (3, 3), (5, 3)])
@pytest.mark.parametrize("wire", ["threads", "copy_engine"])
def test_micro_batches_in_flight_take_turns_as_without_the_wrapper(wire, rows, in_flight, way, layout):
    """(A muted all-to-all waits for nothing, and no lane hands over in it.)"""
    ids = tokens(rows, 9)

    def work(engine: Engine) -> list[list[tuple[int, int]]]:
        order: list[tuple[greenlet, int]] = []
        for number, layer in enumerate(engine.runner.decoder.layers):
            layer.register_forward_pre_hook(lambda module, args, number=number: order.append((getcurrent(), number)))
        batch, found = engine.prepare(ids, None, None)[0], []

        def run() -> None:
            order.clear()
            engine.prefill(batch, "last")
            lanes = list(dict.fromkeys(lane for lane, _ in order))
            found.append([(lanes.index(lane), number) for lane, number in order])

        run()
        with way(engine):
            run()
        run()
        return found

    options = {"micro_batch_size": 1, "interleave": "on", "in_flight": in_flight, "wire": wire}
    for plain, wrapped, after in serve(small_model(), work, **options, **layout):
        assert plain == wrapped == after
        assert plain[:2] == [(0, 0), (1, 0)] or (wire, *layout) == ("threads", "ulysses_degree")


RECORDED: dict[str, dict[str, Any]] = {
    "ring3": {"ring_degree": 3},
    "ring3_contiguous": {"ring_degree": 3, "ring_impl": "contiguous"},
    "ulysses2_ring2": {"ulysses_degree": 2, "ring_degree": 2},
    "dp2_ring2": {"dp_size": 2, "ring_degree": 2},
    "pp2": {"pp_size": 2},
}


@pytest.mark.parametrize("wire", ["process_groups", "copy_engine"])
@pytest.mark.parametrize("layout", RECORDED.values(), ids=RECORDED.keys())
def test_a_recorded_forward_is_the_same_and_its_journal_moves_as_much(layout, wire):
    ids = tokens(4, LENGTH)

    def work(engine: Engine) -> tuple[Any, ...]:
        batch, traffic = engine.prepare(ids, None, None)[0], engine.mesh.traffic

        def run() -> tuple[list[Tensor | None], dict[str, int]]:
            traffic.bytes_by_op.clear()
            found = [shard.logits_BkV for shard in engine.prefill(batch, "last")]
            return found, dict(traffic.bytes_by_op)

        plain, sent = run()
        with recorded(engine) as journal:
            again, sent_again = run()
        assert all(a is b or torch.equal(a, b) for a, b in zip(plain, again, strict=True))
        count = traffic.count
        for replay in journal:
            replay()
        return sent, sent_again, dict(traffic.bytes_by_op), traffic.count - count, len(journal)

    for sent, recorded_sent, after, counted, entries in serve(
        small_model(), work, wire=wire, micro_batch_size=2, batch_size=4, **layout
    ):
        assert sent == recorded_sent == after
        assert counted == 0
        assert entries > 0


def test_slices_of_weights_sum_by_the_recorded_transport():
    model, ids = build(llama_gqa(hidden_size=64, num_attention_heads=8, num_key_value_heads=4)), tokens(2, 21)

    def work(engine: Engine) -> tuple[int, int]:
        sums, sp = [], engine.mesh["sp"]
        all_reduce = sp._all_reduce
        sp._all_reduce = lambda tensor: sums.append(tensor.shape) or all_reduce(tensor)
        with recorded(engine) as journal:
            engine.generate(ids, max_new_tokens=3, **GREEDY)
        done = list(sums)
        sums.clear()
        for again in journal:
            again()
        assert sums == done
        reduces = [part.reduce for part in engine.runner.slices.values() if part.reduce is not None]
        assert all(reduce is sp for reduce in reduces)
        return len(done), len(reduces)

    for done, reduces in serve(model, work, ring_degree=2, decode="sliced"):
        assert done == 2 * reduces > 0, "two tokens come of steps, the first of the prompt"
