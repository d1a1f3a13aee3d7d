"""What transports count of what they send, and what they do while they are muted."""

import pytest
import torch

from tests.helpers.worlds import in_group, to_next

SHORT_S = 0.5


def test_bytes_that_leave_a_rank_are_counted_by_operation():
    def work(transport):
        to_next(transport, torch.ones(5, dtype=torch.float16), torch.empty(5, dtype=torch.float16)).wait()
        transport.all_to_all(torch.ones(4, 3))
        transport.all_gather(torch.ones(100))
        transport.all_reduce(torch.ones(8, 2))
        transport.broadcast(torch.ones(7), 2)
        return dict(transport.traffic.bytes_by_op)

    sent = {"exchange": 10, "all_to_all": 3 * 3 * 4, "all_gather": 3 * 100 * 4, "all_reduce": 64 * 2 * 3 // 4}
    assert in_group(4, work) == [sent | {"broadcast": 3 * 7 * 4 * (rank == 2)} for rank in range(4)]


def test_what_is_received_is_not_counted():
    def work(transport):
        if transport.rank == 0:
            transport.exchange([(1, torch.ones(8))], []).wait()
        else:
            transport.exchange([], [(0, torch.empty(8))]).wait()
        return transport.traffic.bytes_sent

    assert in_group(2, work) == [32, 0]


def test_a_muted_transport_counts_but_moves_nothing():
    def work(transport):
        if transport.rank == 1:
            return None  # nobody to answer: a message that moved would be noticed
        transport.muted = True
        received, sent = torch.full((2,), torch.nan), torch.ones(2, 3)
        to_next(transport, torch.ones(2), received).wait()
        assert transport.all_to_all(sent) is sent
        assert transport.all_reduce(sent) is sent
        assert torch.isfinite(received).all(), "what was not received must still be numbers"
        return dict(transport.traffic.bytes_by_op)

    assert in_group(2, work, SHORT_S)[0] == {"exchange": 8, "all_to_all": 12, "all_reduce": 24}


def test_unmuting_moves_again():
    def work(transport):
        received = torch.zeros(1)
        for muted in (True, False):
            transport.muted = muted
            to_next(transport, torch.tensor([5.0 + transport.rank]), received).wait()
        return received.item()

    assert in_group(2, work) == [6.0, 5.0]


@pytest.mark.parametrize("muted", [False, True])
def test_a_journal_replays_every_operation_in_order_without_counting_it(muted):
    def work(transport):
        transport.traffic.journal = []
        transport.muted = muted
        to_next(transport, torch.ones(3), torch.empty(3)).wait()
        transport.all_to_all(torch.ones(2, 5))
        transport.all_reduce(torch.ones(7))
        to_next(transport, torch.ones(4).half(), torch.empty(4).half()).wait()
        journal, before = list(transport.traffic.journal), transport.traffic.bytes_sent
        moved = []
        exchange, all_to_all, all_reduce = transport._exchange, transport._all_to_all, transport._all_reduce
        transport._exchange = lambda sends, receives: (
            moved.append([(p, t.shape, t.dtype) for p, t in (*sends, *receives)]) or exchange(sends, receives)
        )
        transport._all_to_all = lambda send: moved.append(send.shape) or all_to_all(send)
        transport._all_reduce = lambda tensor: moved.append(tensor.shape) or all_reduce(tensor)
        for again in journal:
            again()
        assert transport.traffic.bytes_sent == before
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


def test_without_a_journal_nothing_is_kept():
    def work(transport):
        transport.all_to_all(torch.ones(2, 5))
        return transport.traffic.journal

    assert in_group(2, work) == [None, None]
