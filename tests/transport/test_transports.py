"""What the attention algorithms rely on when they move bytes, and how a world of threads shows a misuse."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ds_ring.errors import CheckpointError, DisagreementError, DsRingError, TransportError, UserError
from ds_ring.parallel.layout import SequenceLayout
from ds_ring.parallel.topology import Topology
from ds_ring.testing.threaded import ThreadedWorld
from ds_ring.transport.base import Done
from ds_ring.transport.solo import SoloTransport
from tests.helpers.attention_problems import Problem, run_attention
from tests.helpers.limits import HANG_S
from tests.helpers.mocked_world import outcome
from tests.helpers.worlds import in_group, mesh_of, to_next

SHORT_S = 0.5


def error_of(work) -> str:
    """The text of the TransportError that ``work()`` raises."""
    with pytest.raises(TransportError) as caught:
        work()
    return str(caught.value)


class TestExchange:
    @pytest.mark.parametrize("size", [2, 3, 5])
    def test_round_a_ring(self, size):
        def work(transport):
            received = torch.empty(2, 3)
            to_next(transport, torch.full((2, 3), float(transport.rank)), received).wait()
            return received.unique().tolist()

        assert in_group(size, work) == [[(r - 1) % size] for r in range(size)]

    def test_messages_between_two_ranks_arrive_in_the_order_in_which_they_were_sent(self):
        def work(transport):
            buffers = [torch.empty(1) for _ in range(4)]
            if transport.rank == 0:
                pendings = [transport.exchange([(1, torch.tensor([float(i)]))], []) for i in range(4)]
            else:
                pendings = [transport.exchange([], [(0, buffer)]) for buffer in buffers]
            for pending in pendings:
                pending.wait()
            return [buffer.item() for buffer in buffers]

        assert in_group(2, work)[1] == [0.0, 1.0, 2.0, 3.0]

    def test_several_messages_of_one_exchange(self):
        def work(transport):
            peers = [p for p in range(3) if p != transport.rank]
            sends = [(p, torch.tensor([10 * transport.rank + p])) for p in peers]
            receives = [(p, torch.empty(1, dtype=torch.long)) for p in peers]
            transport.exchange(sends, receives).wait()
            return [t.item() for _, t in receives]

        assert in_group(3, work) == [[10, 20], [1, 21], [2, 12]]

    def test_a_rank_with_nothing_to_move_is_done_at_once(self):
        assert in_group(2, lambda transport: isinstance(transport.exchange([], []), Done)) == [True, True]

    @pytest.mark.parametrize("side", ["sends", "receives"])
    def test_strided_messages_are_refused(self, side):
        message = [(0, torch.zeros(4, 4).t())]
        with pytest.raises(AssertionError, match="messages must be contiguous"):
            SoloTransport().exchange(**{"sends": [], "receives": [], side: message})

    @pytest.mark.parametrize(
        ("buffer", "text"),
        [
            (torch.empty(3), "rank 1 expects (3,) torch.float32 from rank 0, which sent (2,) torch.float32"),
            (torch.empty(2).half(), "rank 1 expects (2,) torch.float16 from rank 0, which sent (2,) torch.float32"),
        ],
    )
    def test_a_receiver_that_expects_something_else_says_what_it_got(self, buffer, text):
        sent = threading.Event()

        def work(transport):
            if transport.rank == 0:
                pending = transport.exchange([(1, torch.ones(2))], [])
                sent.set()
                return error_of(pending.wait)
            sent.wait(HANG_S)
            return error_of(transport.exchange([], [(0, buffer)]).wait)

        assert in_group(2, work, SHORT_S) == ["rank 0: a message was never received", text]

    def test_a_peer_that_never_sends_is_named(self):
        def work(transport):
            if transport.rank == 1:
                return error_of(transport.exchange([], [(2, torch.empty(1))]).wait)
            return None

        assert in_group(3, work, SHORT_S)[1] == f"rank 1: no message from rank 2 in {SHORT_S} s"

    def test_a_sender_that_reuses_its_buffer_too_early_is_caught(self):
        overwritten = threading.Event()

        def work(transport):
            tensor = torch.full((4,), 1.0 + transport.rank)
            if transport.rank == 0:
                pending = transport.exchange([(1, tensor)], [])
                tensor.fill_(-1.0)
                overwritten.set()
            else:
                assert overwritten.wait(5)
                pending = transport.exchange([], [(0, tensor)])
            pending.wait()
            return tensor.tolist()

        assert in_group(2, work)[1] == [-1.0] * 4

    def test_after_wait_a_buffer_may_be_reused(self):
        def work(transport):
            received, tensor = torch.empty(1), torch.tensor([float(transport.rank)])
            seen = []
            for _ in range(20):
                to_next(transport, tensor, received).wait()
                seen.append(received.item())
                tensor += 2
            return seen

        assert in_group(2, work) == [[1.0 + 2 * i for i in range(20)], [0.0 + 2 * i for i in range(20)]]


class TestCollectives:
    @pytest.mark.parametrize("size", [2, 4])
    def test_all_to_all_transposes_ranks(self, size):
        def work(transport):
            return transport.all_to_all(torch.arange(size) + 10 * transport.rank).tolist()

        assert in_group(size, work) == [[10 * j + rank for j in range(size)] for rank in range(size)]

    def test_all_gather_stacks_in_rank_order_whatever_the_strides(self):
        def work(transport):
            return transport.all_gather((torch.arange(6).view(2, 3) + 10 * transport.rank).t())

        for gathered in in_group(3, work):
            assert torch.equal(gathered, torch.stack([(torch.arange(6).view(2, 3) + 10 * r).t() for r in range(3)]))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32])
    def test_all_reduce_gives_every_rank_the_same_sum(self, dtype):
        def work(transport):
            return transport.all_reduce((torch.arange(6).view(2, 3) + 10 * transport.rank).to(dtype))

        for total in in_group(3, work):
            assert torch.equal(total, (3 * torch.arange(6).view(2, 3) + 30).to(dtype))

    @pytest.mark.parametrize("source", [0, 2])
    def test_a_broadcast_gives_the_sources_tensor_and_keeps_the_others(self, source):
        def work(transport):
            own = (torch.arange(6).view(2, 3) + 10 * transport.rank).t()
            received = transport.broadcast(own, source)
            received += 100
            return received.tolist(), own.tolist()

        for rank, (received, own) in enumerate(in_group(3, work)):
            assert received == (torch.arange(6).view(2, 3) + 10 * source + 100).t().tolist()
            assert rank == source or own == (torch.arange(6).view(2, 3) + 10 * rank).t().tolist()

    def test_objects_are_gathered_in_rank_order(self):
        assert in_group(3, lambda t: t.all_gather_objects(("rank", t.rank))) == [[("rank", r) for r in range(3)]] * 3

    def test_collectives_may_follow_each_other_at_once(self):
        def work(transport):
            return [int(transport.all_gather(torch.tensor([i + transport.rank])).sum()) for i in range(20)]

        assert in_group(3, work) == [[3 * i + 3 for i in range(20)]] * 3

    @pytest.mark.parametrize("operation", ["all_to_all", "all_gather", "all_reduce"])
    def test_unequal_tensors_are_refused_on_every_rank(self, operation):
        def work(transport):
            return error_of(lambda: getattr(transport, operation)(torch.ones(2, 4 if transport.rank else 3)))

        assert in_group(2, work) == ["ranks bring unequal tensors to a collective: [(2, 3), (2, 4)]"] * 2

    @pytest.mark.parametrize(
        "operation",
        [
            lambda t: t.all_to_all(torch.ones(3)),
            lambda t: t.all_gather(torch.ones(3)),
            lambda t: t.all_reduce(torch.ones(3)),
            lambda t: t.broadcast(torch.ones(3), 0),
            lambda t: t.all_gather_objects(1),
            lambda t: t.agree(dtype="fp16"),
            lambda t: t.barrier(),
        ],
        ids=["all_to_all", "all_gather", "all_reduce", "broadcast", "all_gather_objects", "agree", "barrier"],
    )
    def test_a_rank_that_stays_away_is_noticed(self, operation):
        def work(transport):
            return None if transport.rank == 2 else error_of(lambda: operation(transport))

        text = "a rank of this group of 3 did not reach the collective"
        assert in_group(3, work, SHORT_S) == [text, text, None]

    @pytest.mark.parametrize("size", [2, 3])
    @pytest.mark.parametrize("heads", [1, 2])
    def test_heads_are_joined_into_whole_memory(self, size, heads):
        def work(transport):
            parts = torch.arange(size)[None, :, None, None, None].expand(2, size, 3, heads, 4) + 10 * transport.rank
            return transport.all_to_all_joined(parts.flatten(1, 2))

        for rank, joined in enumerate(in_group(size, work)):
            assert joined.is_contiguous()
            assert joined.shape == (2, 3, size * heads, 4)
            want = torch.arange(size).repeat_interleave(heads) * 10 + rank
            assert torch.equal(joined[1, 2, :, 3], want)

    @pytest.mark.parametrize("size", [2, 3])
    def test_all_to_all_needs_one_part_a_rank(self, size):
        with pytest.raises(AssertionError):
            in_group(size, lambda transport: transport.all_to_all(torch.ones(size + 1)))


class TestAgreement:
    def test_equal_values_pass(self):
        assert in_group(4, lambda transport: transport.agree(dtype="fp16")) == [None] * 4

    def test_the_first_rank_that_differs_and_both_values_are_named_on_every_rank(self):
        def work(transport):
            return error_of(lambda: transport.agree(tokens="abc" if transport.rank < 2 else "xyz"))

        text = "ranks disagree on tokens: rank 0 has abc, rank 2 has xyz; make it the same on all ranks"
        assert in_group(4, work) == [text] * 4

    def test_of_several_the_first_is_named_and_not_that_of_a_sets_order(self):
        def work(transport):
            return error_of(lambda: transport.agree(dtype="fp16", **{f"fact{i}": transport.rank for i in range(50)}))

        assert all(text.startswith("ranks disagree on fact0: rank 0 has 0, rank 1 has 1") for text in in_group(2, work))

    def test_what_is_done_together_fails_on_every_rank_or_on_none(self):
        def work(transport, fails):
            with transport.together():
                if transport.rank in fails:
                    raise fails[transport.rank]

        def errors(fails):
            return in_group(3, lambda transport: outcome(lambda: work(transport, fails)))

        assert errors({}) == [None] * 3
        own, other = OSError("no libcuda"), TransportError("rank 2 does not read")
        found = errors({1: own, 2: other})
        assert found[1:] == [own, other]
        assert (type(found[0]), str(found[0])) == (TransportError, "rank 1: no libcuda")
        assert [str(error) for error in errors({2: other})] == ["rank 2 does not read"] * 3
        assert str(errors({2: AssertionError()})[0]) == "rank 2: AssertionError"
        (found, *_) = errors({1: CheckpointError("no head"), 2: own})
        assert (type(found), str(found)) == (CheckpointError, "rank 1: no head")


class TestWorld:
    def test_an_error_of_a_rank_is_raised_and_not_what_it_caused_elsewhere(self):
        def work(transport):
            if transport.rank == 1:
                raise ValueError("mine")
            transport.barrier()

        start = time.monotonic()
        with pytest.raises(ValueError, match="mine"):
            in_group(3, work)
        assert time.monotonic() - start < HANG_S / 2, "the others should not have waited for their time-out"

    @pytest.mark.parametrize("waits", ["send", "receive"])
    def test_nobody_waits_for_a_message_once_a_rank_has_failed(self, waits):
        begun = threading.Event()

        def work(transport):
            if transport.rank == 1:
                begun.wait(HANG_S)
                raise ValueError("mine")
            message = [(1, torch.ones(2))]
            pending = transport.exchange(*((message, []) if waits == "send" else ([], message)))
            begun.set()
            pending.wait()

        start = time.monotonic()
        with pytest.raises(ValueError, match="mine"):
            in_group(2, work)
        assert time.monotonic() - start < HANG_S / 2

    def test_ranks_run_at_once_and_results_come_in_rank_order(self):
        def work(transport):
            transport.barrier()
            return transport.rank

        assert in_group(16, work) == list(range(16))

    def test_two_worlds_of_different_degrees_at_once_do_not_meet(self):
        layouts = [SequenceLayout(24, 4, 1), SequenceLayout(24, 2, 2), SequenceLayout(24, 1, 3)]
        problems = [Problem(24, heads=12, kv_heads=6, seed=i) for i in range(3)]
        with ThreadPoolExecutor(3) as pool:
            for _ in range(5):
                results = pool.map(lambda p, layout: run_attention(p, layout, variant="pass_kv"), problems, layouts)
                for problem, result in zip(problems, results, strict=True):
                    assert problem.error(result.out_BLHD) < 1e-6

    def test_two_meshes_of_different_degrees_in_one_world_do_not_meet(self):
        world = ThreadedWorld(4, HANG_S)

        def work(rank):
            ring4, ring2 = (mesh_of(world, t, rank) for t in (Topology(ring=4), Topology(ring=2, ulysses=2)))
            first, second = torch.empty(1), torch.empty(1)
            pendings = [
                to_next(ring4["ring"], torch.tensor([float(rank)]), first),
                to_next(ring2["ring"], torch.tensor([100.0 + rank]), second),
            ]
            # Started in one order, waited for in the other: only separate groups keep them apart.
            for pending in reversed(pendings):
                pending.wait()
            return first.item(), second.item(), ring4.traffic.bytes_sent, ring2.traffic.bytes_sent

        assert world.run(work) == [((r - 1) % 4, 100 + (r + 2) % 4, 4, 4) for r in range(4)]


class TestSolo:
    def test_nothing_moves_and_everything_answers(self):
        transport = SoloTransport()
        tensor = torch.arange(6.0).view(1, 6)
        assert (transport.rank, transport.size) == (0, 1)
        assert torch.equal(transport.all_to_all(tensor), tensor)
        assert torch.equal(transport.all_gather(tensor), tensor[None])
        assert torch.equal(transport.all_reduce(tensor), tensor)
        assert torch.equal(transport.broadcast(tensor, 0), tensor)
        assert transport.all_gather_objects("x") == ["x"]
        assert transport.agree(tokens="abc") is None
        assert transport.barrier() is None
        assert transport.traffic.bytes_sent == 0

    def test_an_exchange_with_itself_is_a_copy(self):
        target = torch.zeros(3)
        SoloTransport().exchange([(0, torch.ones(3))], [(0, target)]).wait()
        assert target.tolist() == [1.0] * 3


def test_transport_errors_are_ours_and_not_the_users():
    assert issubclass(TransportError, DsRingError)
    assert not issubclass(TransportError, UserError)
    assert issubclass(DisagreementError, UserError), "what ranks were given is for the user to put right"
