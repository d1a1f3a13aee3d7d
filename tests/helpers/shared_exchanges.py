"""Rounds of tensors that ranks share by copy engine, and who sees whose."""

import torch

from ds_ring.transport.copy_engine import CopyEngineTransport


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
