"""The copy engine as a transport, and attention over what it pulls. (Its protocol: test_peer_buffers.py)"""

import pytest
import torch
from deepspeed import comm as dist

from ds_ring.parallel.layout import SequenceLayout
from ds_ring.testing.host_staged import HostStagedTransport
from tests.helpers.attention_problems import Problem, run_attention
from tests.helpers.mocked_world import one_process
from tests.helpers.peer_threads import Later, copy_engine_mesh, pulling, random_delay
from tests.helpers.process_group_world import ProcessGroupWorld

EXACT, WRONG = 1e-6, 1e-2


class TestTransport:
    @pytest.mark.parametrize("size", [2, 3, 4])
    @pytest.mark.parametrize("in_place", [False, True])
    def test_all_to_all_transposes_ranks(self, size, in_place):
        def work(transport):
            found = []
            for number in range(5):
                mine = torch.arange(size * 2.0).view(size, 2) + 100 * transport.rank + 1000 * number
                send = transport.send_buffer(mine.shape, mine).copy_(mine) if in_place else mine
                found.append(transport.all_to_all(send))
            return torch.stack(found), transport.traffic.bytes_sent

        for rank, (found, sent) in enumerate(pulling(size, work, random_delay(3))):
            want = [
                [[2 * rank + i + 100 * peer + 1000 * n for i in range(2)] for peer in range(size)] for n in range(5)
            ]
            assert found.tolist() == want
            assert sent == 5 * (size - 1) * 2 * 4

    @pytest.mark.parametrize("shape", [(3, 2, 5, 4), (3, 1, 5, 4), (3, 2, 1)])
    def test_tokens_of_an_all_to_all_are_side_by_side_in_the_order_of_ranks(self, shape):
        def work(transport):
            send = torch.randn(shape, generator=torch.Generator().manual_seed(transport.rank))
            parts = transport.all_to_all(send)
            sent = transport.traffic.bytes_sent
            joined = transport.all_to_all_side_by_side(transport.send_buffer(shape, send).copy_(send))
            assert transport.traffic.bytes_sent == 2 * sent > 0
            assert torch.equal(joined, torch.cat(list(parts), 1))

        pulling(3, work, random_delay(5))

    @pytest.mark.parametrize("in_place", [False, True])
    @pytest.mark.parametrize("batch", [1, 2])
    def test_heads_of_an_all_to_all_are_joined_in_the_order_of_ranks(self, batch, in_place):
        def work(transport):
            everyone = [torch.randn(batch, 3 * 5, 2, 4, generator=torch.Generator().manual_seed(r)) for r in range(3)]
            send = everyone[transport.rank]
            joined = transport.all_to_all_joined(
                transport.send_buffer(send.shape, send).copy_(send) if in_place else send
            )
            assert transport.traffic.bytes_sent == send.nbytes * 2 // 3
            mine = slice(5 * transport.rank, 5 * transport.rank + 5)
            assert joined.shape == (batch, 5, 6, 4)
            assert joined.is_contiguous()
            for peer, part in enumerate(joined.split(2, 2)):
                assert torch.equal(part, everyone[peer][:, mine])

        pulling(3, work, random_delay(5))

    def test_messages_and_agreement_go_by_the_group_that_controls_it(self):
        def work(transport):
            received = torch.empty(3)
            transport.exchange(
                [(1 - transport.rank, torch.ones(3) + transport.rank)], [(1 - transport.rank, received)]
            ).wait()
            transport.agree(dtype="fp16")
            transport.barrier()
            gathered = transport.all_gather(torch.tensor([transport.rank]))
            return received.tolist(), gathered.tolist(), transport.all_gather_objects(transport.rank)

        assert pulling(2, work) == [([2.0] * 3, [[0], [1]], [0, 1]), ([1.0] * 3, [[0], [1]], [0, 1])]


def test_messages_by_way_of_host_memory():
    """What controls the copy engine where ranks share a GPU."""

    def work(rank: int):
        transport = HostStagedTransport(dist.get_world_group(), range(3), rank)
        received = torch.empty(2)
        pending = transport.exchange([((rank + 1) % 3, torch.full((2,), 1.0 * rank))], [((rank - 1) % 3, received)])
        pending.wait()
        gathered, swapped = (
            transport.all_gather(torch.tensor([rank])),
            transport.all_to_all(torch.arange(3) + 10 * rank),
        )
        return received.tolist(), gathered.tolist(), swapped.tolist()

    with one_process():
        for rank, found in enumerate(ProcessGroupWorld(3).run(work)):
            assert found == ([(rank - 1.0) % 3] * 2, [[0], [1], [2]], [rank, 10 + rank, 20 + rank])


VARIANTS = ("pass_kv", "gather_kv", "local_first", "auto")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ring_impl", ["zigzag", "contiguous"])
@pytest.mark.parametrize("split", [(2, 1), (3, 1), (1, 4), (2, 2), (3, 4)], ids=str)
def test_attention_over_pulled_blocks(split, ring_impl, variant):
    problem = Problem(63, heads=8, kv_heads=4, batch=2, with_sinks=True)
    layout = SequenceLayout(63, *split, ring_impl)
    pulled = run_attention(problem, layout, variant=variant, make_mesh=copy_engine_mesh(random_delay(0)), repeats=4)
    assert problem.error(pulled.out_BLHD) < EXACT
    sent = run_attention(problem, layout, variant=variant)
    assert problem.error(sent.out_BLHD) < EXACT
    assert [dict(t.bytes_by_op) for t in pulled.traffic] == [dict(t.bytes_by_op) for t in sent.traffic]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("length", "window"), [(1, None), (5, None), (101, 20), (101, 1000)])
def test_few_tokens_and_windows(length, window, variant):
    problem = Problem(length, heads=4, kv_heads=1, window=window)
    result = run_attention(problem, SequenceLayout(length, 3, 2), variant=variant, make_mesh=copy_engine_mesh())
    assert problem.error(result.out_BLHD) < EXACT


@pytest.mark.usefixtures("late_writer")
def test_attention_shows_a_missing_wait(monkeypatch):
    problem = Problem(63, heads=4, kv_heads=4)
    monkeypatch.setattr(Later, "wait_flag", lambda *_: None)
    mesh = copy_engine_mesh()
    result = run_attention(problem, SequenceLayout(63, 3), variant="gather_kv", make_mesh=mesh, repeats=3)
    assert not problem.error(result.out_BLHD) < WRONG
