"""The copy engine's protocol over threads: exact under any delay, wrong as soon as one of its waits is left out."""

import contextlib
import random
import re

import peer_threads
import pytest
import torch
from mocked_world import outcome
from peer_threads import AtOnce, Later, ThreadDevice, all_are_late, no_delay, one_is_late, pulling, random_delay

from ds_ring.errors import TransportError
from ds_ring.transport.copy_engine import CopyEngineTransport
from ds_ring.transport.peer_memory import rows_of
from ds_ring.transport.shared import Within
from ds_ring.transport.slots import FARTHEST, pieces


def everyone(reader: int, owner: int) -> bool:
    return True


def later_ranks(reader: int, owner: int) -> bool:
    """As in a contiguous ring: rank 0 is read by all and never reads, so that only the protocol holds it back."""
    return reader > owner


def rounds(transport: CopyEngineTransport, count: int, sees=everyone, shape: tuple[int, ...] = (3, 4)) -> float:
    """The worst error over ``count`` rounds in which ranks take two rows of the tensors they see."""
    rank, size = transport.rank, transport.size
    rows = (slice(1, 3),)
    worst = 0.0
    for number in range(count):
        with transport.share(shape, torch.empty(0)) as shared:
            shared.own.fill_(100.0 * number + rank)
            after, before = ([(rank + sign * hop) % size for hop in range(1, size)] for sign in (1, -1))
            shared.publish([(peer, rows) if sees(peer, rank) else None for peer in after])
            taken = [(peer, *shared.pull((peer, rows) if sees(rank, peer) else None)) for peer in before]
            for peer, pending, part in taken:
                pending.wait()
                assert part.shape == ((2, *shape[1:]) if sees(rank, peer) else (0,))
                worst = max(worst, float((part - (100.0 * number + peer)).abs().nan_to_num(1e9).sum()))
            assert bool((shared.own == 100.0 * number + rank).all()), "nobody else writes into a rank's own tensor"
    return worst


def nested(transport: CopyEngineTransport, dice: random.Random, depth: int) -> bool:
    """``depth`` tensors shared one inside the other, each with readers and a shape drawn by ``dice``, which all ranks
    throw alike; then an all-to-all. Whether all that was taken is right."""
    rank, size = transport.rank, transport.size
    tag, rows = float(dice.randint(1, 10**6)), dice.randint(1, 4)
    shape, index = (2, 4, dice.randint(1, 9)), (slice(None), slice(0, rows))
    pairs = {(reader, owner) for reader in range(size) for owner in range(size) if dice.random() < 0.6}
    right = True
    with transport.share(shape, torch.empty(0)) as shared:
        shared.own.fill_(tag + rank)
        after, before = ([(rank + sign * hop) % size for hop in range(1, size)] for sign in (1, -1))
        shared.publish([(peer, index) if (peer, rank) in pairs else None for peer in after])
        taken = [(peer, *shared.pull((peer, index) if (rank, peer) in pairs else None)) for peer in before]
        if depth > 1:
            right = nested(transport, dice, depth - 1)
        for peer, pending, part in taken:
            pending.wait()
            right &= bool((part == tag + peer).all())
        right &= bool((shared.own == tag + rank).all())
    swapped = transport.all_to_all(torch.full((size, dice.randint(1, 5)), tag + rank))
    return right and swapped[:, 0].tolist() == [tag + peer for peer in range(size)]


class TestProtocol:
    @pytest.mark.parametrize("size", [2, 3, 5])
    @pytest.mark.parametrize("sees", [everyone, later_ranks])
    @pytest.mark.parametrize("seed", [1, 2])
    def test_every_round_is_exact_under_random_delays(self, size, sees, seed):
        assert pulling(size, lambda t: rounds(t, 12, sees), random_delay(seed)) == [0.0] * size

    @pytest.mark.parametrize("sees", [everyone, later_ranks])
    def test_every_round_is_exact_beside_a_late_reader(self, sees):
        assert pulling(3, lambda t: rounds(t, 6, sees), one_is_late) == [0.0] * 3

    @pytest.mark.parametrize("sees", [everyone, later_ranks])
    @pytest.mark.usefixtures("late_writer")
    def test_every_round_is_exact_beside_a_late_writer(self, sees):
        assert pulling(3, lambda t: rounds(t, 4, sees)) == [0.0] * 3

    @pytest.mark.parametrize("one_queue", [False, True])
    @pytest.mark.parametrize("seed", range(4))
    def test_programs_drawn_at_random_are_exact(self, seed, one_queue):
        """Tensors of any shape shared with anyone, up to three at once, between all-to-alls."""

        def work(transport):
            dice = random.Random(seed)
            return [nested(transport, dice, dice.randint(1, 3)) for _ in range(12)]

        size = 2 + seed % 3
        assert pulling(size, work, random_delay(seed), one_queue) == [[True] * 12] * size

    def test_two_tensors_shared_at_once_have_memory_of_their_own(self):
        def work(transport):
            with transport.share((4,), torch.empty(0)) as first, transport.share((4,), torch.empty(0)) as second:
                first.own.fill_(1.0 + transport.rank)
                second.own.fill_(10.0 + transport.rank)
                peer, found = 1 - transport.rank, []
                for shared in (first, second):
                    shared.publish([(peer, (slice(None),))])
                for shared in (second, first):
                    pending, part = shared.pull((peer, (slice(None),)))
                    pending.wait()
                    found.append(part[0].item())
            return found

        assert pulling(2, work) == [[11.0, 2.0], [10.0, 1.0]]


class TestMistakesShow:
    """Each wait and each order of the protocol, left out, gives wrong numbers on a schedule that is exact with it."""

    TRIALS = 3
    """Delays are of milliseconds: a machine that is busy elsewhere for as long may hide a mistake once."""

    def broken(self, delay=no_delay) -> bool:
        return any(max(pulling(3, lambda t: rounds(t, 5, later_ranks), delay)) > 0.0 for _ in range(self.TRIALS))

    def test_the_schedule_is_exact_as_long_as_nothing_is_left_out(self):
        assert not self.broken(all_are_late)

    def test_writing_before_all_readers_are_through(self, monkeypatch):
        # AtOnce's own, not what pull queues inherit: the wait of (1).
        wait = AtOnce.wait_flag
        monkeypatch.setattr(
            AtOnce, "wait_flag", lambda self, *what: None if type(self) is AtOnce else wait(self, *what)
        )
        assert self.broken(all_are_late)

    @pytest.mark.usefixtures("late_writer")
    def test_reading_before_the_owner_has_written(self, monkeypatch):
        monkeypatch.setattr(Later, "wait_flag", lambda *_: None)
        assert self.broken()

    def test_saying_that_one_has_read_before_one_has(self, monkeypatch):
        copy = Later.copy
        held = []
        monkeypatch.setattr(Later, "copy", lambda self, *what: held.append((self, what)))
        raise_flag = Later.raise_flag

        def early(self, *what):
            raise_flag(self, *what)
            mine = [entry for entry in held if entry[0] is self]
            for entry in mine:
                held.remove(entry)
                copy(self, *entry[1])

        monkeypatch.setattr(Later, "raise_flag", early)
        assert self.broken(all_are_late)

    def test_using_a_part_before_it_is_there(self, monkeypatch):
        monkeypatch.setattr(peer_threads._Mark, "wait", lambda self: None)
        assert self.broken(all_are_late)

    def test_publishing_before_writing(self):
        def work(transport):
            peer = 1 - transport.rank
            with transport.share((4,), torch.empty(0)) as shared:
                shared.publish([(peer, (slice(None),))])
                pending, part = shared.pull((peer, (slice(None),)))
                pending.wait()
                transport.barrier()
                shared.own.fill_(1.0)
            return bool((part == 1.0).all())

        assert pulling(2, work) == [False, False]

    def test_giving_memory_back_that_peers_still_read(self, monkeypatch):
        def growing(transport):
            return rounds(transport, 3, later_ranks) + rounds(transport, 2, later_ranks, shape=(9, 5))

        assert pulling(3, growing, all_are_late) == [0.0] * 3
        monkeypatch.setattr(ThreadDevice, "meet", lambda self: None)
        assert any(max(pulling(3, growing, all_are_late)) > 0.0 for _ in range(self.TRIALS))

    def test_a_pull_of_what_was_not_published_is_named(self, monkeypatch):
        monkeypatch.setattr(peer_threads, "TIMEOUT_S", 0.5)

        def work(transport):
            with transport.share((4,), torch.empty(0)) as shared:
                shared.publish([None])
                if transport.rank == 0:
                    shared.pull((1, (slice(None),)))[0].wait()

        with pytest.raises(Exception, match="rank 0: flag 1 stays at 0, short of 1"):
            pulling(2, work)


class TestSelfTest:
    @staticmethod
    def errors(size):
        """What the self-test raises on every rank; all must be able to agree on something behind it."""

        def work(transport):
            error = outcome(lambda: transport.self_test(torch.device("cpu")))
            assert transport.all_gather_objects("behind it") == ["behind it"] * size
            return error

        return pulling(size, work)

    def test_memory_that_is_not_the_peers_fails_the_self_test(self, monkeypatch):
        assert pulling(3, lambda t: (t.self_test(torch.device("cpu")), t.traffic.bytes_sent)) == [(None, 0)] * 3
        monkeypatch.setattr(Later, "copy", lambda *_: None)
        with pytest.raises(TransportError, match=r"rank \d does not read what rank \d wrote into its memory"):
            pulling(3, lambda t: t.self_test(torch.device("cpu")))

    @pytest.mark.parametrize("size", [2, 3])
    @pytest.mark.parametrize("alone", [0, 1])
    def test_wrong_numbers_on_one_rank_alone_fail_the_self_test_on_all(self, alone, size, monkeypatch):
        """Late in the test, when peers have waited for that rank's flags all along, and want more of them."""
        copy, copies = Later.copy, []

        def wrong(self, target, source):
            copies.extend([0] if self._device.rank == alone else [])
            if self._device.rank != alone or len(copies) < 2:
                copy(self, target, source)

        monkeypatch.setattr(Later, "copy", wrong)
        errors = self.errors(size)
        assert {type(error) for error in errors} == {TransportError}
        (text,) = {str(error) for error in errors}
        assert re.fullmatch(rf"rank {alone} does not read what rank \d wrote into its memory", text)

    @pytest.mark.parametrize(
        ("queue", "operation"),
        [(AtOnce, "raise_flag"), (Later, "wait_flag"), (Later, "copy"), (Later, "raise_flag")],
        ids=lambda what: getattr(what, "__name__", what),
    )
    @pytest.mark.parametrize("kind", [OSError, AttributeError, RuntimeError])
    def test_an_operation_that_one_rank_lacks_fails_the_self_test_on_all(self, queue, operation, kind, monkeypatch):
        works, error = getattr(queue, operation), kind(f"no {operation}")

        def lacking(self, *what):
            if self._device.rank == 1:
                raise error
            works(self, *what)

        monkeypatch.setattr(queue, operation, lacking)
        errors = self.errors(3)
        assert errors[1] is error
        assert [str(errors[rank]) for rank in (0, 2)] == [f"rank 1: {error}"] * 2

    def test_memory_that_one_rank_does_not_get_fails_the_self_test_on_all(self, monkeypatch):
        error, make = ImportError("no symmetric memory"), ThreadDevice.own_bytes

        def lacking(self, nbytes):
            if self.rank == 1:
                raise error
            return make(self, nbytes)

        monkeypatch.setattr(ThreadDevice, "own_bytes", lacking)
        errors = self.errors(3)
        assert errors[1] is error
        assert [str(errors[rank]) for rank in (0, 2)] == [f"rank 1: {error}"] * 2


class TestSlots:
    def test_memory_stays_flat_and_grows_with_the_largest_tensor(self):
        def work(transport):
            worst = rounds(transport, 10)
            first = list(transport.slots._device.allocated)
            worst += rounds(transport, 6, shape=(9, 5)) + rounds(transport, 6)
            device = transport.slots._device
            assert device.peak == device.held == transport.shared_bytes, "old and new memory are not held at once"
            return worst, first, device.allocated, transport.shared_bytes

        small, large = 3 * 4 * 4, 9 * 5 * 4
        assert pulling(3, work) == [(0.0, [small] * 2, [small] * 2 + [large] * 2, 2 * large)] * 3

    def test_memory_for_what_is_to_come_replaces_what_there_is(self):
        """Only what is too small; and there are two slots, none open, behind it."""

        def work(transport):
            slots, like = transport.slots, torch.empty(0)
            transport.reserve([(2,), (1,)], like)
            rounds(transport, 2, shape=(4, 4))
            transport.reserve([(20,), (30,), (10,)], like)
            transport.reserve([(30,)], like)
            worst = rounds(transport, 5, shape=(5, 6))
            return worst, slots._device.allocated, slots._device.peak, slots.count, transport.shared_bytes

        assert pulling(3, work) == [(0.0, [8, 8, 64, 64, 120, 120], 240, 2, 240)] * 3

    @pytest.mark.parametrize("sees", [everyone, later_ranks])
    @pytest.mark.parametrize("seed", [1, 2])
    def test_growing_at_every_round_is_exact_under_random_delays(self, sees, seed):
        def work(transport):
            return max(rounds(transport, 1, sees, shape=(3, width)) for width in range(1, 9))

        assert pulling(3, work, random_delay(seed)) == [0.0] * 3

    @pytest.mark.parametrize("sees", [everyone, later_ranks])
    def test_a_large_tensor_makes_do_with_one_slot(self, sees, monkeypatch):
        """After small ones in two, and before. Exact with one in use too, whoever is late."""
        monkeypatch.setattr("ds_ring.transport.slots.LARGE", 100)

        def work(transport):
            worst = rounds(transport, 4, sees) + rounds(transport, 5, sees, shape=(9, 5))
            alone = transport.shared_bytes
            worst += rounds(transport, 4, sees) + rounds(transport, 3, sees, shape=(9, 5))
            return worst, transport.slots._device.allocated, alone, transport.shared_bytes

        small, large = 3 * 4 * 4, 9 * 5 * 4
        made = [small] * 2 + [large] + [small]
        assert pulling(3, work, one_is_late) == [(0.0, made, large, small + large)] * 3

    @pytest.mark.parametrize("late", [no_delay, random_delay(3)], ids=["at once", "delayed"])
    def test_fewer_and_larger_tensors_at_once_leave_no_slots_that_nobody_wants(self, late):
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

    def test_dtypes_take_turns_in_a_slot(self):
        def work(transport):
            for dtype in (torch.float32, torch.float16, torch.int64, torch.float16):
                with transport.share((5,), torch.empty(0, dtype=dtype)) as shared:
                    shared.own.fill_(transport.rank)
                    shared.publish([(1 - transport.rank, (slice(None),))])
                    pending, part = shared.pull((1 - transport.rank, (slice(None),)))
                    pending.wait()
                    assert part.tolist() == [1 - transport.rank] * 5

        pulling(2, work)


PARTS = {
    "whole": (torch.randn(2, 3, 5, 4), 1, 1),
    "rows of all": (torch.randn(2, 3, 5, 4)[:, :, :2], 1, 1),
    "k and v in a projection": (torch.randn(2, 5, 3, 3, 4)[..., 1:, :].movedim(3, 0), 2, 4),
    "some rows of both": (torch.randn(2, 5, 3, 3, 4)[:, :2, :, 1:].movedim(3, 0), 4, 4),
}


@pytest.mark.parametrize(("part", "into_whole", "into_apart"), PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("apart", [False, True], ids=["target whole", "target apart"])
def test_copies_are_rows_or_whole_memory_and_as_few_as_can_be(part, into_whole, into_apart, apart):
    outer, rows, inner = part.shape[:2], part.shape[2], part.shape[3:]
    target = torch.empty(*outer, rows + 4 * apart, *inner)[:, :, :rows]
    found = list(pieces(target, part))
    for t, s in found:
        to, of = rows_of(t), rows_of(s)
        assert to[0] == 1 or of[0] == 1 or to[:2] == of[:2]
        t.copy_(s)
    assert torch.equal(target, part)
    assert len(found) == (into_apart if apart else into_whole)


def test_rows_that_are_too_far_apart_for_one_copy_are_copied_one_by_one():
    far = torch.empty(1, dtype=torch.int8, device="meta").as_strided((3, 8), (FARTHEST + 1, 1))
    near = far.as_strided((3, 8), (FARTHEST, 1))
    target = torch.empty(3, 8, dtype=torch.int8, device="meta")
    assert [len(list(pieces(target, source))) for source in (near, far)] == [1, 3]


@pytest.mark.parametrize(
    ("tensor", "rows"),
    [
        (torch.empty(2, 3, 4), (1, 24, 24)),
        (torch.empty(5), (1, 5, 5)),
        (torch.empty(2, 7, 3, 24)[..., 8:16], (42, 8, 24)),  # heads of a fused projection, k among q, k and v
        (torch.empty(2, 7, 96)[..., 32:64].unflatten(-1, (4, 8)), (14, 32, 96)),  # k between q and v of a token
        (torch.empty(1, 7, 3, 24)[:, 2:5, :, :8], (9, 8, 24)),
        (torch.empty(2, 9, 4)[:, 2:5], (2, 12, 36)),
        (torch.empty(4, 6, 8)[:, ::2, :4], (12, 4, 16)),
        (torch.empty(3, 6, 5, 8)[:, :, 1:3, :4], None),
        (torch.empty(3, 4).T, None),
        (torch.empty(1, 4).expand(3, 4), None),
        (torch.empty(3, 8)[:, ::2], (12, 1, 2)),  # as rows of one element
    ],
)
def test_tensors_that_are_rows_at_one_distance(tensor, rows):
    found = rows_of(tensor)
    assert found == rows
    if rows is None:
        return
    count, width, distance = rows
    numbers = torch.arange(tensor.untyped_storage().nbytes() // tensor.element_size())
    placed = numbers.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    assert torch.equal(
        placed.reshape(-1), numbers.as_strided((count, width), (distance, 1), tensor.storage_offset()).reshape(-1)
    )


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("one_queue", [False, True])
def test_parts_of_a_larger_tensor_are_exact_under_random_delays(size, one_queue):
    """By turns with whole ones."""

    def work(transport: CopyEngineTransport) -> float:
        worst, others = 0.0, [(transport.rank - hop) % size for hop in range(1, size)]
        for number in range(16):
            shape = (3, rows := 5 + number % 4, 8)
            within = Within((3, rows, 24), (24 * rows, 24, 1), 8) if number % 3 else None
            with transport.share(shape, torch.empty(0), within) as shared:
                shared.memory.fill_(torch.nan)
                shared.own.fill_(100.0 * number + transport.rank)
                shared.publish([(peer, (slice(None),)) for peer in others])
                for peer, (pending, part) in [(p, shared.pull((p, (slice(None),)))) for p in others]:
                    pending.wait()
                    worst = max(worst, float((part - 100.0 * number - peer).abs().max()))
        return worst

    assert pulling(size, work, random_delay(3), one_queue) == [0.0] * size
