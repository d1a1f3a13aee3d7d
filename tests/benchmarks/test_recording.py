"""Transports that keep a journal of how to move as much again."""

import gc
import weakref

import pytest
import torch

from benchmarks.communication.muting import muted_transport
from benchmarks.communication.recording import recorded_transport
from ds_ring.parallel.layout import SequenceLayout
from ds_ring.transport.solo import SoloTransport
from tests.helpers.attention_problems import Problem, run_attention
from tests.helpers.peer_threads import copy_engine_mesh, pulling
from tests.helpers.shared_exchanges import later_ranks, rounds
from tests.helpers.worlds import in_group, to_next


@pytest.mark.parametrize("muted", [False, True])
def test_a_journal_replays_every_operation_in_order_without_counting_it(muted):
    def work(transport):
        moved, journal = [], []
        exchange, all_to_all, all_reduce = transport._exchange, transport._all_to_all, transport._all_reduce
        transport._exchange = lambda sends, receives: (
            moved.append([(p, t.shape, t.dtype) for p, t in (*sends, *receives)]) or exchange(sends, receives)
        )
        transport._all_to_all = lambda send: moved.append(send.shape) or all_to_all(send)
        transport._all_reduce = lambda tensor: moved.append(tensor.shape) or all_reduce(tensor)
        recorded = recorded_transport(muted_transport(transport) if muted else transport, journal)
        to_next(recorded, torch.ones(3), torch.empty(3)).wait()
        recorded.all_to_all(torch.ones(2, 5))
        recorded.all_reduce(torch.ones(7))
        to_next(recorded, torch.ones(4).half(), torch.empty(4).half()).wait()
        assert len(moved) == (0 if muted else 4)
        moved.clear()
        before = transport.traffic.bytes_sent, transport.traffic.count
        assert before[1] == 4
        for again in journal:
            again()
        assert (transport.traffic.bytes_sent, transport.traffic.count) == before
        return moved

    def message(size, dtype):
        return torch.Size([size]), dtype

    for rank, moved in enumerate(in_group(2, work)):
        assert moved == [
            [(1 - rank, *message(3, torch.float32))] * 2,
            torch.Size([2, 5]),
            torch.Size([7]),
            [(1 - rank, *message(4, torch.float16))] * 2,
        ]


def test_results_and_counts_are_the_transports_own():
    def results(transport):
        received = torch.empty(3)
        to_next(transport, torch.ones(3) + transport.rank, received).wait()
        mine = torch.arange(6.0).view(3, 2) + 10 * transport.rank
        found = received, transport.all_to_all(mine), transport.all_reduce(mine.clone()), transport.all_gather(mine)
        return [*(t.tolist() for t in found), transport.broadcast(mine, 1).tolist()], dict(
            transport.traffic.bytes_by_op
        )

    def recorded(transport):
        journal = []
        found = results(recorded_transport(transport, journal))
        assert len(journal) == 5
        for again in journal:
            again()
        return found

    assert in_group(3, recorded) == in_group(3, results)


def test_what_moves_nothing_is_not_done_again():
    """A rank of a contiguous ring may neither send nor receive at a hop, and process groups refuse an empty list."""

    def work(transport):
        journal = []
        recorded_transport(transport, journal).exchange([], []).wait()
        return len(journal), transport.traffic.count

    assert in_group(2, work) == [(0, 1)] * 2


def test_a_journal_keeps_no_tensor_alive():
    journal, tensor, received = [], torch.ones(1, 5), torch.empty(1, 5)
    recorded = recorded_transport(SoloTransport(), journal)
    recorded.all_to_all(tensor)
    recorded.exchange([(0, tensor)], [(0, received)]).wait()
    kept = [weakref.ref(tensor), weakref.ref(received)]
    del tensor, received
    gc.collect()
    assert len(journal) == 2
    assert [tensor() for tensor in kept] == [None, None]


class TestCopyEngine:
    def test_a_journal_moves_the_same_again_without_counting_it(self):
        def work(transport):
            journal = []
            recorded = recorded_transport(transport, journal)
            rounds(recorded, 3, later_ranks)
            recorded.all_to_all(torch.ones(3, 4))
            before, moved = (transport.traffic.bytes_sent, transport.traffic.count), []
            pull = transport.buffers.pull

            def watched(buffer, peer, pieces):
                kept = list(pieces)
                moved.append((peer, sum(target.nbytes for target, _ in kept)))
                return pull(buffer, peer, iter(kept))

            transport.buffers.pull = watched
            for again in journal:
                again()
            assert (transport.traffic.bytes_sent, transport.traffic.count) == before
            return moved

        for rank, moved in enumerate(pulling(3, work)):
            seen = [(peer, 32) for peer in ((rank - 1) % 3, (rank - 2) % 3) if peer < rank]
            assert moved == 3 * seen + [((rank - 1) % 3, 16), ((rank - 2) % 3, 16)]

    @pytest.mark.parametrize("split", [(3, 1), (1, 4), (2, 2)], ids=str)
    def test_attention_is_the_same_and_can_be_moved_again(self, split):
        problem, layout = Problem(63, heads=8, kv_heads=4, batch=2), SequenceLayout(63, *split)
        journals = []

        def wrap(transport):
            journals.append([])
            return recorded_transport(transport, journals[-1])

        plain = run_attention(problem, layout, make_mesh=copy_engine_mesh(), repeats=2)
        recorded = run_attention(problem, layout, make_mesh=copy_engine_mesh(), repeats=2, wrap=wrap)
        assert torch.equal(recorded.out_BLHD, plain.out_BLHD)
        assert [t.bytes_by_op for t in recorded.traffic] == [t.bytes_by_op for t in plain.traffic]
        assert any(journals)
