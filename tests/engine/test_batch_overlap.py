"""Several micro-batches in flight: the same numbers, in an order that never varies."""

import threading
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from ds_ring.attention import ring
from ds_ring.attention.kv_exchange import KVExchange
from ds_ring.engine.batch_overlap import run_interleaved
from ds_ring.engine.engine import Engine
from ds_ring.hf import linear
from ds_ring.transport.copy_engine import PulledTensor
from ds_ring.transport.peer_buffers import BufferPool, PeerBuffer
from tests.helpers.mocked_world import relative_error, serve
from tests.helpers.tiny_models import build, gpt_neox, llama_gqa, logits, tokens


def run(steps: list[int], fail: dict[int, int] | None = None, lanes: int = 2) -> tuple[list[int], list[str]]:
    """Jobs of so many steps with a hand-over between each two; (results, what ran when)."""
    yield_lane: list[Any] = [None]
    events: list[str] = []

    def job(number: int) -> int:
        for step in range(steps[number]):
            if step:
                yield_lane[0]()
            events.append(f"{number}.{step}")
            if (fail or {}).get(number) == step:
                raise ValueError(f"job {number}")
        return 10 * number

    def on_yield(call) -> None:
        yield_lane[0] = call

    try:
        found = run_interleaved([lambda n=n: job(n) for n in range(len(steps))], on_yield, lanes)
    finally:
        assert yield_lane[0] is None
    return found, events


class Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.by_job: dict[float, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.add.Tensor:
            self.by_job[args[1]] = self.by_job.get(args[1], 0) + 1
        return func(*args, **(kwargs or {}))


def test_who_looks_on_sees_what_every_lane_does():
    """As the account of DeepSpeed's all-reduces does, of a pass in several lanes."""
    yield_lane: list[Any] = [None]

    def job(number: int) -> float:
        total = torch.zeros(())
        for _ in range(3):
            total = total + number
            yield_lane[0]()
        return float(total)

    with Counter() as counter:
        results = run_interleaved([lambda n=n: job(n) for n in range(5)], lambda call: yield_lane.insert(0, call), 2)
    assert results == [0.0, 3.0, 6.0, 9.0, 12.0]
    assert counter.by_job == dict.fromkeys(range(5), 3)


class TestTurns:
    @pytest.mark.parametrize(
        ("steps", "order"),
        [
            ([3, 3], "0.0 1.0 0.1 1.1 0.2 1.2"),
            ([2, 2, 2, 2], "0.0 1.0 0.1 2.0 1.1 3.0 2.1 3.1"),
            ([2, 2, 2], "0.0 1.0 0.1 2.0 1.1 2.1"),
            ([1, 3], "0.0 1.0 1.1 1.2"),
            ([3, 1], "0.0 1.0 0.1 0.2"),
            ([2], "0.0 0.1"),
        ],
    )
    def test_lanes_take_turns_and_a_free_lane_takes_its_next_job_at_once(self, steps, order):
        for _ in range(20):
            results, events = run(steps)
            assert results == [10 * n for n in range(len(steps))]
            assert " ".join(events) == order

    def test_three_lanes(self):
        assert " ".join(run([2, 2, 2, 2], lanes=3)[1]) == "0.0 1.0 2.0 0.1 3.0 1.1 2.1 3.1"

    @pytest.mark.parametrize("number", [0, 1])
    @pytest.mark.parametrize("step", [0, 1, 2])
    def test_an_error_of_either_lane_is_raised_and_stops_the_other(self, number, step):
        with pytest.raises(ValueError, match=f"job {number}"):
            run([3, 3, 3, 3], {number: step})
        assert not torch.is_inference_mode_enabled()

    def test_a_lane_that_is_stopped_leaves_what_it_is_in(self):
        """Even where what is on the way out hands over or fails itself."""
        yield_lane: list[Any] = [None]
        left: list[str] = []

        def waits() -> None:
            with torch.inference_mode():
                try:
                    while True:
                        yield_lane[0]()
                except GreenletExit:
                    left.append("waits")
                    raise KeyError("a consequence") from None
                finally:
                    yield_lane[0]()

        def fails() -> None:
            yield_lane[0]()
            raise ValueError("the cause")

        with pytest.raises(ValueError, match="the cause"):
            run_interleaved([waits, fails, waits, waits], lambda call: yield_lane.insert(0, call), 4)
        assert left == ["waits"] * 3
        assert not torch.is_inference_mode_enabled()

    def test_all_lanes_are_the_calling_thread(self):
        """What PyTorch keeps by thread, cuDNN's plans for one, all of them share."""
        yield_lane: list[Any] = [None]

        def job() -> int:
            yield_lane[0]()
            return threading.get_ident()

        found = run_interleaved([job] * 5, lambda call: yield_lane.insert(0, call), 3)
        assert found == [threading.get_ident()] * 5


LAYOUTS = {
    "ring3": {"ring_degree": 3},
    "ring3_pass_kv": {"ring_degree": 3, "ring_variant": "pass_kv"},
    "ring2_contiguous": {"ring_degree": 2, "ring_impl": "contiguous"},
    "ulysses3": {"ulysses_degree": 3},
    "ulysses3_ring2": {"ulysses_degree": 3, "ring_degree": 2},
}


@cache
def two_layers() -> PreTrainedModel:
    return build(llama_gqa(num_hidden_layers=2))


def unequal(engine: Engine) -> tuple[Tensor, list[Tensor], dict[str, int]]:
    """Logits and scores of sequences of unequal lengths, and the bytes that the first forward of them sends."""
    ids, mask = tokens(5, 61), torch.ones(5, 61, dtype=torch.long)
    for sequence, length in enumerate((61, 40, 7, 1, 33)):
        mask[sequence, length:] = 0
    engine.mesh.traffic.bytes_by_op.clear()
    found, sent = engine(ids, mask).logits, dict(engine.mesh.traffic.bytes_by_op)
    return found, engine.score(ids, mask).log_probs, sent


@cache
def in_turn(label: str, wire: str, micro_batch_size: int) -> list[tuple[Tensor, list[Tensor], dict[str, int]]]:
    # One variant both ways: auto would take the one that suits each.
    options = {"ring_variant": "gather_kv"} | LAYOUTS[label]
    return serve(two_layers(), unequal, wire=wire, interleave="off", micro_batch_size=micro_batch_size, **options)


@pytest.mark.parametrize("wire", ["threads", "copy_engine"])
@pytest.mark.parametrize("label", LAYOUTS)
@pytest.mark.parametrize(("micro_batch_size", "in_flight"), [(1, 2), (2, 2), (1, 3)])
def test_micro_batches_of_unequal_lengths_give_what_they_give_in_turn(label, wire, micro_batch_size, in_flight):
    options = {"micro_batch_size": micro_batch_size, "wire": wire, "ring_variant": "gather_kv"} | LAYOUTS[label]
    together = serve(two_layers(), unequal, interleave="on", in_flight=in_flight, **options)
    apart = in_turn(label, wire, micro_batch_size)
    for (got, scores, sent), (want, want_scores, want_sent) in zip(together, apart, strict=True):
        assert torch.equal(got, want)
        assert all(torch.equal(a, b) for a, b in zip(scores, want_scores, strict=True))
        assert sent == want_sent


def order_of_layers(sequences: int = 2, **options) -> list[tuple[int, int]]:
    """(lane, layer) as the first rank begins them, for rows in micro-batches of one."""
    ids, mask = tokens(sequences, 9), torch.ones(sequences, 9, dtype=torch.long)
    mask[1, 8] = 0

    def work(engine: Engine) -> list[tuple[int, int]]:
        order: list[tuple[greenlet, int]] = []
        for number, layer in enumerate(engine.runner.decoder.layers):
            layer.register_forward_pre_hook(lambda module, args, number=number: order.append((getcurrent(), number)))
        engine(ids, mask)
        lanes = list(dict.fromkeys(lane for lane, _ in order))
        return [(lanes.index(lane), number) for lane, number in order]

    return serve(build(gpt_neox(heads=4, layers=2)), work, micro_batch_size=1, ring_degree=2, **options)[0]


@pytest.mark.parametrize(
    ("wire", "interleave", "overlaps"),
    [
        ("copy_engine", "auto", True),
        ("copy_engine", "off", False),
        ("threads", "auto", False),
        ("threads", "on", True),
    ],
)
def test_layers_of_two_micro_batches_alternate_where_that_hides_transfers(wire, interleave, overlaps):
    alternating = [(0, 0), (1, 0), (0, 1), (1, 1)]
    in_turn = [(0, 0), (0, 1), (0, 0), (0, 1)]
    assert order_of_layers(wire=wire, interleave=interleave) == (alternating if overlaps else in_turn)


def test_more_than_two_micro_batches_in_flight_go_through_each_layer_together():
    by_layer = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]
    assert order_of_layers(sequences=3, wire="copy_engine", in_flight=4) == by_layer
    assert order_of_layers(sequences=3, wire="copy_engine", in_flight=3) == by_layer


def test_micro_batches_in_flight_transfer_together_under_the_last_ones_projections(monkeypatch):
    """All of them before the first attends."""
    events: list[tuple[int, str]] = []
    start, publish, gather_kv = KVExchange.start, PulledTensor.publish, ring.gather_kv

    def starts(self: KVExchange) -> None:
        events.append((self.transport.rank, "has projected"))
        start(self)

    def publishes(self: PulledTensor, outgoing: Any) -> None:
        events.append((self._transport.rank, "transfers"))
        publish(self, outgoing)

    def attends(q_BLHD: torch.Tensor, exchange: KVExchange, *rest: Any) -> torch.Tensor:
        events.append((exchange.transport.rank, "attends"))
        return gather_kv(q_BLHD, exchange, *rest)

    monkeypatch.setattr(KVExchange, "start", starts)
    monkeypatch.setattr(PulledTensor, "publish", publishes)
    monkeypatch.setattr(ring, "gather_kv", attends)
    model, ids = build(gpt_neox(heads=4, layers=2)), tokens(3, 20)
    options = {"ring_degree": 2, "ring_variant": "gather_kv", "in_flight": 3}
    found = serve(model, lambda engine: engine(ids).logits, wire="copy_engine", **options)
    assert all(relative_error(got, logits(model, ids)) < 1e-5 for got in found)
    layer = [*2 * ["has projected"], *2 * ["transfers"], "has projected", "transfers", *3 * ["attends"]]
    for rank in range(2):
        assert [event for at, event in events if at == rank] == 2 * layer


def test_ulysses_trades_heads_of_micro_batches_in_flight_together(monkeypatch):
    """There and back: all of a layer's queries, keys and values, then all results."""
    events: list[tuple[int, str]] = []
    publish, release = BufferPool.publish, BufferPool.release

    def publishes(self: BufferPool, slot: PeerBuffer, peers: Any) -> None:
        events.append((self._rank, "begins"))
        publish(self, slot, peers)

    def releases(self: BufferPool, slot: PeerBuffer) -> None:
        events.append((self._rank, "is through"))
        release(self, slot)

    monkeypatch.setattr(BufferPool, "publish", publishes)
    monkeypatch.setattr(BufferPool, "release", releases)
    model, ids = build(gpt_neox(heads=4, layers=2)), tokens(3, 20)
    found = serve(model, lambda engine: engine(ids).logits, wire="copy_engine", ulysses_degree=2, in_flight=3)
    assert all(relative_error(got, logits(model, ids)) < 1e-5 for got in found)
    together = [*3 * ["begins"], *3 * ["is through"]]
    for rank in range(2):
        # In front of them the transport's test of itself, which is none of the engine's.
        assert [event for at, event in events if at == rank][-4 * len(together) :] == 4 * together


@pytest.mark.parametrize("options", [{"ring_degree": 2}, {"ring_degree": 2, "ulysses_degree": 2}], ids=str)
def test_the_copy_engine_serves_the_engine_as_it_is_configured_by_default(options):
    model, ids = build(gpt_neox(heads=4, layers=2)), tokens(3, 101)
    for got in serve(model, lambda engine: engine(ids).logits, wire="copy_engine", **options):
        assert relative_error(got, logits(model, ids)) < 1e-5


def test_a_lane_yields_during_its_tensor_parallel_sum(monkeypatch):
    """(``tests/launched/test_layouts.py`` runs two micro-batches of a launched model so.)"""
    events: list[str] = []

    def all_reduce(tensor, group, async_op):
        assert (group, async_op) == ("a group", True)
        events.append("begins")
        return SimpleNamespace(wait=lambda: events.append("is waited for"))

    monkeypatch.setattr(linear, "all_reduce", all_reduce)
    module = SimpleNamespace(mp_group="a group", yield_lane=lambda: events.append("yields"))
    linear.Linear(module, "row_parallel")._summed(torch.ones(2))
    assert events == ["begins", "yields", "is waited for"]
