"""Memory of the copy engine's buffers: how much there is, when it grows and what is given back."""

import contextlib

import pytest
import torch

from tests.helpers.peer_threads import no_delay, one_is_late, pulling, random_delay
from tests.helpers.shared_exchanges import everyone, later_ranks, rounds


def test_memory_stays_flat_and_grows_with_the_largest_tensor():
    def work(transport):
        worst = rounds(transport, 10)
        first = list(transport.buffers._device.allocated)
        worst += rounds(transport, 6, shape=(9, 5)) + rounds(transport, 6)
        device = transport.buffers._device
        assert device.peak == device.held == transport.shared_bytes, "old and new memory are not held at once"
        return worst, first, device.allocated, transport.shared_bytes

    small, large = 3 * 4 * 4, 9 * 5 * 4
    assert pulling(3, work) == [(0.0, [small] * 2, [small] * 2 + [large] * 2, 2 * large)] * 3


def test_memory_for_what_is_to_come_replaces_what_there_is():
    """Only what is too small; and there are two buffers, none open, behind it."""

    def work(transport):
        buffers, like = transport.buffers, torch.empty(0)
        transport.reserve([(2,), (1,)], like)
        rounds(transport, 2, shape=(4, 4))
        transport.reserve([(20,), (30,), (10,)], like)
        transport.reserve([(30,)], like)
        worst = rounds(transport, 5, shape=(5, 6))
        return worst, buffers._device.allocated, buffers._device.peak, buffers.count, transport.shared_bytes

    assert pulling(3, work) == [(0.0, [8, 8, 64, 64, 120, 120], 240, 2, 240)] * 3


@pytest.mark.parametrize("sees", [everyone, later_ranks])
@pytest.mark.parametrize("seed", [1, 2])
def test_growing_at_every_round_is_exact_under_random_delays(sees, seed):
    def work(transport):
        return max(rounds(transport, 1, sees, shape=(3, width)) for width in range(1, 9))

    assert pulling(3, work, random_delay(seed)) == [0.0] * 3


@pytest.mark.parametrize("sees", [everyone, later_ranks])
def test_a_large_tensor_makes_do_with_one_slot(sees, monkeypatch):
    """After small ones in two, and before. Exact with one in use too, whoever is late."""
    monkeypatch.setattr("ds_ring.transport.peer_buffers.LARGE", 100)

    def work(transport):
        worst = rounds(transport, 4, sees) + rounds(transport, 5, sees, shape=(9, 5))
        alone = transport.shared_bytes
        worst += rounds(transport, 4, sees) + rounds(transport, 3, sees, shape=(9, 5))
        return worst, transport.buffers._device.allocated, alone, transport.shared_bytes

    small, large = 3 * 4 * 4, 9 * 5 * 4
    made = [small] * 2 + [large] + [small]
    assert pulling(3, work, one_is_late) == [(0.0, made, large, small + large)] * 3


@pytest.mark.parametrize("late", [no_delay, random_delay(3)], ids=["at once", "delayed"])
def test_fewer_and_larger_tensors_at_once_leave_no_slots_that_nobody_wants(late):
    def at_once(transport, count, shape):
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(transport.share(shape, torch.empty(0))) for _ in range(count)]
            for number, shared in enumerate(opened):
                shared.own.fill_(100.0 * number + transport.rank)
                shared.publish([(1 - transport.rank, (slice(None),))])
            wrong = 0.0
            for number, shared in enumerate(opened):
                pending, part = shared.pull((1 - transport.rank, (slice(None),)))
                pending.wait()
                wrong += float((part - (100.0 * number + 1 - transport.rank)).abs().sum())
            return wrong

    def work(transport):
        wrong, held = 0.0, []
        for count, shape in ((6, (2,)), (3, (4,)), (3, (4,)), (6, (2,)), (2, (8,)), (2, (8,))):
            wrong += at_once(transport, count, shape)
            held.append(transport.shared_bytes // 4)
        return wrong, held

    # The third time six are open, three of the former ones still serve; two larger ones then take turns.
    assert pulling(2, work, late) == [(0.0, [12, 12, 12, 18, 16, 16])] * 2


def test_dtypes_take_turns_in_a_slot():
    def work(transport):
        for dtype in (torch.float32, torch.float16, torch.int64, torch.float16):
            with transport.share((5,), torch.empty(0, dtype=dtype)) as shared:
                shared.own.fill_(transport.rank)
                shared.publish([(1 - transport.rank, (slice(None),))])
                pending, part = shared.pull((1 - transport.rank, (slice(None),)))
                pending.wait()
                assert part.tolist() == [1 - transport.rank] * 5

    pulling(2, work)
