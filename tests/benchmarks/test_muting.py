"""Transports that leave out what they count."""

import pytest
import torch

from benchmarks.communication.muting import muted_transport
from benchmarks.communication.wrapped import wrapped_axes
from ds_ring.parallel.layout import SequenceLayout
from ds_ring.parallel.topology import Topology
from tests.helpers.attention_problems import Problem, run_attention
from tests.helpers.peer_threads import copy_engine_mesh, pulling, random_delay
from tests.helpers.worlds import in_group, in_mesh, to_next

SHORT_S = 0.5
WRONG = 1e-2
WRAPS = {"moving": lambda transport: transport, "muted": muted_transport}


def test_a_muted_transport_counts_but_moves_nothing():
    def work(transport):
        if transport.rank == 1:
            return None  # nobody to answer: a message that moved would be noticed
        muted = muted_transport(transport)
        received, sent = torch.full((2,), torch.nan), torch.ones(2, 3)
        to_next(muted, torch.ones(2), received).wait()
        assert muted.all_to_all(sent) is sent
        assert muted.all_reduce(sent) is sent
        assert torch.isfinite(received).all(), "what was not received must still be numbers"
        assert received.count_nonzero() == 2
        return dict(transport.traffic.bytes_by_op)

    assert in_group(2, work, SHORT_S)[0] == {"exchange": 8, "all_to_all": 12, "all_reduce": 24}


def test_what_results_are_made_of_still_moves():
    def work(transport):
        muted = muted_transport(transport)
        mine = torch.tensor([5 + transport.rank])
        gathered, told = muted.all_gather(mine), muted.broadcast(mine, 1)
        return gathered.tolist(), told.tolist(), muted.all_gather_objects(transport.rank)

    assert in_group(2, work) == [([[5], [6]], [6], [0, 1])] * 2


def test_after_the_block_all_moves_again():
    def work(mesh):
        received, own = torch.zeros(1), mesh["ring"]
        mine = torch.tensor([5.0 + mesh.rank])
        with wrapped_axes(mesh, ["ring", "ulysses"], muted_transport):
            to_next(mesh["ring"], mine, received).wait()
            assert mesh["ring"] is not own
            assert mesh["ulysses"].size == 1
        assert mesh["ring"] is own
        to_next(mesh["ring"], mine, received).wait()
        return received.item()

    assert in_mesh(Topology(ring=2), work) == [6.0, 5.0]


def test_lanes_hand_over_as_at_the_transport_itself():
    def work(transport):
        muted, calls = muted_transport(transport), []
        muted.beforehand, transport.meanwhile = (lambda: calls.append("met")), (lambda: calls.append("yielded"))
        muted.meet_lanes()
        muted.yield_lane()
        assert transport.beforehand is muted.beforehand
        assert muted.meanwhile is transport.meanwhile
        return calls

    assert in_group(1, work) == [["met", "yielded"]]


class TestCopyEngine:
    def test_it_counts_and_touches_nothing(self):
        def work(transport):
            if transport.rank == 1:
                return None
            muted = muted_transport(transport)
            muted.reserve([(2, 3)], torch.empty(0))
            with muted.share((2, 3), torch.empty(0)) as shared:
                shared.own.fill_(1.0)
                shared.publish([(1, (slice(0, 1),))])
                pending, part = shared.pull((1, (slice(0, 2),)))
                pending.wait()
            send = muted.send_buffer((2, 4), part)
            assert muted.all_to_all(send) is send
            assert torch.isfinite(part).all()
            return dict(transport.traffic.bytes_by_op), transport.buffers.count

        assert pulling(2, work)[0] == ({"exchange": 12, "all_to_all": 16}, 0)

    def test_random_numbers_stand_for_what_comes_before_there_are_own_ones(self):
        def work(transport):
            with muted_transport(transport).share((40, 50), torch.empty(0)) as shared:
                _, nothing = shared.pull(None)
                shared.own.fill_(torch.nan)
                _, part = shared.pull((1 - transport.rank, (slice(None),)))
                return nothing.numel(), part.shape, float(part.mean()), float(part.std())

        for nothing, shape, mean, deviation in pulling(2, work):
            assert (nothing, shape) == (0, (40, 50))
            assert abs(mean) < 0.1
            assert abs(deviation - 1) < 0.1

    def test_own_numbers_of_an_earlier_call_stand_for_other_ranks_without_a_copy(self):
        def work(transport):
            muted, rooms = muted_transport(transport), []
            for number in (1.0, 2.0):
                with muted.share((2, 3), torch.empty(0)) as shared:
                    shared.own.fill_(number)
                    shared.publish([(1, (slice(None),))])
                    rooms.append(shared.room((5, 3)))
                    shared.pull_into((1, (slice(None),)), [rooms[-1][:2]], 0).wait()
            assert rooms[0].data_ptr() == rooms[1].data_ptr()
            return rooms[1].unique().tolist()

        assert pulling(2, work) == [[1.0], [1.0]]

    @pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS.keys())
    @pytest.mark.parametrize("shape", [(3, 2, 5, 4), (3, 1, 5, 4), (3, 2, 1)])
    def test_tokens_of_an_all_to_all_are_side_by_side_in_the_order_of_ranks(self, shape, wrap):
        def work(transport):
            transport = wrap(transport)
            send = torch.randn(shape, generator=torch.Generator().manual_seed(transport.rank))
            parts = transport.all_to_all(send)
            sent = transport.traffic.bytes_sent
            joined = transport.all_to_all_side_by_side(transport.send_buffer(shape, send).copy_(send))
            assert transport.traffic.bytes_sent == 2 * sent > 0
            assert torch.equal(joined, torch.cat(list(parts), 1))

        pulling(3, work, random_delay(5))

    @pytest.mark.parametrize("in_place", [False, True])
    @pytest.mark.parametrize("batch", [1, 2])
    def test_own_heads_are_joined_where_they_belong(self, batch, in_place):
        def work(transport):
            muted = muted_transport(transport)
            send = torch.randn(batch, 3 * 5, 2, 4, generator=torch.Generator().manual_seed(transport.rank))
            joined = muted.all_to_all_joined(muted.send_buffer(send.shape, send).copy_(send) if in_place else send)
            assert transport.traffic.bytes_sent == send.nbytes * 2 // 3
            assert joined.shape == (batch, 5, 6, 4)
            assert joined.is_contiguous()
            assert joined.isfinite().all()
            mine = slice(5 * transport.rank, 5 * transport.rank + 5)
            assert torch.equal(joined.split(2, 2)[transport.rank], send[:, mine])

        pulling(3, work, random_delay(5))

    def test_own_columns_are_where_they_belong_and_count_as_much(self):
        columns = [[slice(0, 2), slice(8, 9)], [slice(2, 4), slice(9, 10)], [slice(4, 8), slice(8, 10)]]

        def work(transport):
            own, found = columns[transport.rank], {}
            memory = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(transport.rank))
            for name, wrap in WRAPS.items():
                transport.traffic.bytes_by_op.clear()
                wrapped = wrap(transport)
                send = wrapped.send_buffer(memory.shape, memory).copy_(memory)
                parts = wrapped.all_to_all_columns(send, columns)
                found[name] = [part.shape for part in parts], transport.traffic.bytes_sent
                for part, those in zip(parts, own, strict=True):
                    assert part.isfinite().all()
                    assert torch.equal(part.split(5, 1)[transport.rank], memory[..., those])
            assert found["muted"] == found["moving"]

        pulling(3, work)


@pytest.mark.parametrize("make_mesh", [None, copy_engine_mesh()], ids=["messages", "copy_engine"])
@pytest.mark.parametrize("variant", ["pass_kv", "gather_kv"])
@pytest.mark.parametrize("split", [(4, 1), (1, 4), (2, 2)], ids=str)
def test_attention_with_communication_left_out_is_wrong_and_counts_as_much(split, variant, make_mesh):
    problem, layout = Problem(64, heads=4, kv_heads=4), SequenceLayout(64, *split)
    options = {"variant": variant} | ({"make_mesh": make_mesh} if make_mesh else {})
    muted = run_attention(problem, layout, wrap=muted_transport, **options)
    assert problem.error(muted.out_BLHD) > WRONG
    loud = run_attention(problem, layout, **options)
    assert [t.bytes_by_op for t in muted.traffic] == [t.bytes_by_op for t in loud.traffic]
