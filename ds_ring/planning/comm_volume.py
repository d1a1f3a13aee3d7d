"""Bytes a rank sends for one forward, in closed form, and how many of them leave its host; the transports count the
same as it happens.

For a batch of equal lengths. Notation: b rows of a replica, P padded length, R and U ring and Ulysses degrees, e bytes
an element, d hidden size, n ranks of a tensor-parallel group. Of a group's other ranks ``near`` are on the rank's own
host and ``far`` are not (``placement.py``).

- Ring, zigzag: rank r sends each other rank one chunk of P / 2R tokens, and a lower one both of its chunks. Of two
  ranks one is lower, so a pair sends 3 chunks in both directions together: on average 3/2 chunks for each other rank.
  The last rank sends, and the first one receives, 2 for each. Contiguous: one chunk of P / R tokens to each later
  rank, on average 1/2 for each other rank.
- Ulysses: equal parts to all others.
- Tensor parallel: two all-reduces of [b, L, d] a layer and one of the last tokens' logits. In a ring all-reduce every
  rank sends 2 (n-1)/n of the tensor to the next one; of a group on h hosts h of its n links leave a host.
- Pipeline: every stage but the last hands [b, L, d] on, on each of its tensor-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_ring.attention import ulysses
from ds_ring.config import RunConfig
from ds_ring.model_dims import ModelDims
from ds_ring.parallel.layout import SequenceLayout
from ds_ring.parallel.topology import Axis
from ds_ring.planning.placement import placement


@dataclass(frozen=True)
class Sent:
    """Bytes of one forward along one axis.

    Attributes:
        near, far: what a rank sends to ranks of its host, and to others; means over all ranks.
        most_near, most_far: what the busiest rank sends or receives, whichever is more: links go both ways at once.
    """

    near: float = 0.0
    far: float = 0.0
    most_near: float = 0.0
    most_far: float = 0.0

    @property
    def total(self) -> float:
        return self.near + self.far


def bytes_by_axis(
    config: RunConfig, dims: ModelDims, batch: int, length: int, itemsize: int, per_host: int
) -> dict[Axis, Sent]:
    """What each axis with several ranks sends in one forward that makes logits for the last token of each row."""
    t = config.topology
    rows = batch / t.dp
    found: dict[Axis, Sent] = {}
    if t.ring > 1:
        found["ring"] = _ring(config, dims, rows, length, itemsize, per_host)
    if t.ulysses > 1:
        found["ulysses"] = _ulysses(config, dims, rows, length, itemsize, per_host)
    if t.tp > 1:
        found["tp"] = _tensor_parallel(config, dims, rows, length, itemsize, per_host)
    if t.pp > 1:
        found["pp"] = _pipeline(config, dims, rows, length, itemsize, per_host)
    return found


def bytes_sent_per_rank(config: RunConfig, dims: ModelDims, batch: int, length: int, itemsize: int) -> float:
    """Mean bytes a rank sends in one forward that makes logits for the last token of each row."""
    everywhere = bytes_by_axis(config, dims, batch, length, itemsize, config.topology.world_size)
    return sum(sent.total for sent in everywhere.values())


def _ring(config: RunConfig, dims: ModelDims, rows: float, length: int, itemsize: int, per_host: int) -> Sent:
    p, where = config.parallel, placement(config.topology, "ring", per_host)
    layout = SequenceLayout(length, p.ring_degree, p.ulysses_degree, p.ring_impl)
    mean, most = (1.5, 2) if layout.ring_impl == "zigzag" else (0.5, 1)
    chunk = 0.0
    for kv_heads, head_dim in dims.heads_of_layers:
        heads = len(ulysses.kv_heads_of(0, dims.num_heads, kv_heads, p.ulysses_degree))
        chunk += rows * layout.chunk_length * 2 * heads * head_dim * itemsize
    return Sent(mean * where.near * chunk, mean * where.far * chunk, most * where.most_near * chunk,
                most * where.most_far * chunk)  # fmt: skip


def _ulysses(config: RunConfig, dims: ModelDims, rows: float, length: int, itemsize: int, per_host: int) -> Sent:
    p, where = config.parallel, placement(config.topology, "ulysses", per_host)
    layout = SequenceLayout(length, p.ring_degree, p.ulysses_degree, p.ring_impl)
    peer = 0.0
    for kv_heads, head_dim in dims.heads_of_layers:
        row = 1, layout.local_length, dims.num_heads, head_dim
        peer += rows * ulysses.bytes_sent(row, kv_heads, p.ulysses_degree, itemsize) / (p.ulysses_degree - 1)
    return Sent(where.near * peer, where.far * peer, where.most_near * peer, where.most_far * peer)


def _tensor_parallel(
    config: RunConfig, dims: ModelDims, rows: float, length: int, itemsize: int, per_host: int
) -> Sent:
    where, pp = placement(config.topology, "tp", per_host), config.parallel.pp_size
    n = where.size
    elements = 2 * dims.num_layers * rows * length * dims.hidden_size + rows * dims.vocab_size
    sent = elements * itemsize * 2 * (n - 1) / n / pp
    leaving = (where.crossings + 1) / n if where.leaves_host else 0.0
    # NCCL makes several rings, which leave a host by different ranks: none is busier than others.
    return Sent(sent * (1 - leaving), sent * leaving, sent, sent * leaving)


def _pipeline(config: RunConfig, dims: ModelDims, rows: float, length: int, itemsize: int, per_host: int) -> Sent:
    where = placement(config.topology, "pp", per_host)
    state = rows * length * dims.hidden_size * itemsize
    inside = where.size - 1 - where.crossings
    return Sent(state * inside / where.size, state * where.crossings / where.size, state * (inside > 0),
                state * (where.crossings > 0))  # fmt: skip
