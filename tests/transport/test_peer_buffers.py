"""The copy engine's protocol over threads: exact under any delay, wrong as soon as one of its waits is left out."""

import random
import re

import pytest
import torch

from ds_ring.errors import TransportError
from ds_ring.transport.copy_engine import CopyEngineTransport
from tests.helpers import peer_threads
from tests.helpers.mocked_world import outcome
from tests.helpers.peer_threads import (
    AtOnce,
    Later,
    ThreadDevice,
    all_are_late,
    no_delay,
    one_is_late,
    pulling,
    random_delay,
)
from tests.helpers.shared_exchanges import everyone, later_ranks, rounds


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
        monkeypatch.setattr(peer_threads, "FLAG_S", 0.5)

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
