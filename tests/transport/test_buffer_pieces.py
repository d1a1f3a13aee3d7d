"""Parts of shared tensors as few copies of rows, and parts of larger tensors."""

import pytest
import torch

from ds_ring.transport.copy_engine import CopyEngineTransport
from ds_ring.transport.peer_buffers import FARTHEST, pieces
from ds_ring.transport.peer_memory import rows_of
from ds_ring.transport.shared import ViewOf
from tests.helpers.peer_threads import pulling, random_delay

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
            within = ViewOf((3, rows, 24), (24 * rows, 24, 1), 8) if number % 3 else None
            with transport.share(shape, torch.empty(0), within) as shared:
                shared.memory.fill_(torch.nan)
                shared.own.fill_(100.0 * number + transport.rank)
                shared.publish([(peer, (slice(None),)) for peer in others])
                for peer, (pending, part) in [(p, shared.pull((p, (slice(None),)))) for p in others]:
                    pending.wait()
                    worst = max(worst, float((part - 100.0 * number - peer).abs().max()))
        return worst

    assert pulling(size, work, random_delay(3), one_queue) == [0.0] * size
