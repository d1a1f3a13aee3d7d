"""Bytes a rank sends for one forward, in closed form; the transports count the same thing as it happens.

All figures are means over ranks, for a batch of equal lengths. Notation: b rows of a replica, P padded length, R and U
ring and Ulysses degrees, e bytes an element, d hidden size, n ranks of a tensor-parallel group.
"""

from __future__ import annotations

from ds_ring.attention import ulysses
from ds_ring.config import RunConfig
from ds_ring.model_dims import ModelDims
from ds_ring.parallel.layout import SequenceLayout


def bytes_sent_per_rank(config: RunConfig, dims: ModelDims, batch: int, length: int, itemsize: int) -> float:
    """Mean bytes a rank sends in one forward that makes logits for the last token of each row."""
    t = config.topology
    rows = batch / t.dp
    if t.tp * t.pp > 1:
        return _tensor_parallel(config, dims, rows, length, itemsize) + _pipeline(config, dims, rows, length, itemsize)
    p = config.parallel
    layout = SequenceLayout(length, p.ring_degree, p.ulysses_degree, p.ring_impl)
    total = 0.0
    for kv_heads, head_dim in dims.heads_of_layers:
        row = 1, layout.local_length, dims.num_heads, head_dim
        total += rows * ulysses.bytes_sent(row, kv_heads, p.ulysses_degree, itemsize)
        exchange = len(ulysses.kv_heads_of(0, dims.num_heads, kv_heads, p.ulysses_degree))
        total += rows * _ring(layout) * 2 * exchange * head_dim * itemsize
    return total


def _ring(layout: SequenceLayout) -> float:
    """Tokens of a row whose keys a rank sends. Zigzag: rank r sends R-1+r chunks of P / 2R tokens, on average
    3/2 (R-1). Contiguous: R-1-r of P / R tokens."""
    chunks = (1.5 if layout.ring_impl == "zigzag" else 0.5) * (layout.ring_degree - 1)
    return chunks * layout.chunk_length


def _tensor_parallel(config: RunConfig, dims: ModelDims, rows: float, length: int, itemsize: int) -> float:
    """Two all-reduces of [b, L, d] a layer (each sends 2 (n-1)/n), and one of the last tokens' logits."""
    n, pp = config.tp_size, config.parallel.pp_size
    elements = 2 * dims.num_layers * rows * length * dims.hidden_size + rows * dims.vocab_size
    return elements * itemsize * 2 * (n - 1) / n / pp


def _pipeline(config: RunConfig, dims: ModelDims, rows: float, length: int, itemsize: int) -> float:
    """Every stage but the last hands [b, L, d] on, on each of its tensor-parallel ranks."""
    pp = config.parallel.pp_size
    return rows * length * dims.hidden_size * itemsize * (pp - 1) / pp
