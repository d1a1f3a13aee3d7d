"""What transports count of what they send."""

import torch

from tests.helpers.worlds import in_group, to_next


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
