"""Seconds that one rank computes in a forward, by what it computes: products, attention, and what goes through memory.

Rates are those of a GPU that is busy all the time, at its power limit, with its links asleep.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_ring.config import RunConfig
from ds_ring.model_dims import ModelDims
from ds_ring.parallel.layout import SequenceLayout
from ds_ring.planning.cards import Card
from ds_ring.planning.memory_estimate import mlp_width
from ds_ring.planning.rates import ATTENTION, OTHER_ATTENTION, TILE, AttentionRate


@dataclass(frozen=True)
class Compute:
    """Seconds of one forward on one rank."""

    products: float
    attention: float
    memory: float

    @property
    def parts(self) -> tuple[float, float, float]:
        return self.products, self.attention, self.memory

    @property
    def total(self) -> float:
        return sum(self.parts)


def compute(
    config: RunConfig, dims: ModelDims, linear_parameters: int, rows: int, micro: int, itemsize: int, card: Card
) -> Compute:
    """Of ``rows`` sequences of a replica, ``micro`` at a time."""
    t, p, rates = config.topology, config.parallel, card.rates
    layout = SequenceLayout(config.workload.max_length, p.ring_degree, p.ulysses_degree, p.ring_impl)
    tokens = rows * layout.local_length
    share = -(-dims.num_layers // t.pp) / dims.num_layers / t.tp  # of the stage with the most layers
    at_a_time = micro * layout.local_length
    at_a_time = min(at_a_time, config.workload.block_tokens or at_a_time)
    few = 1 + rates.few_rows / at_a_time
    products = 2.0 * linear_parameters * tokens * share * few / card.product_flops
    attention = 0.0
    for (_, head_dim), window in zip(dims.heads_of_layers, dims.windows, strict=True):
        keys = mean_keys(layout.length, window)
        flops = 4.0 * dims.num_heads * head_dim * tokens * keys
        slowness = _slowness(attention_rate(head_dim), layout, keys) / rates.attention_in_steps
        attention += flops * slowness / card.product_flops
    return Compute(
        products, attention * share, _through_memory(config, dims, linear_parameters, tokens, itemsize, card)
    )


def mean_keys(length: int, window: int | None) -> float:
    """Keys that a query sees, mean over the tokens of a causal sequence: half of all, or a window's."""
    if window is None or window >= length:
        return length / 2
    return window * (1 - window / (2 * length))


def attention_rate(head_dim: int) -> AttentionRate:
    fitting = [size for size in ATTENTION if head_dim <= size]
    if not fitting or (min(fitting) == 512 != head_dim):
        return OTHER_ATTENTION
    return ATTENTION[min(fitting)]


def _slowness(rate: AttentionRate, layout: SequenceLayout, keys: float) -> float:
    """Time over that of a product of as many FLOPs, on the rank that has most to do. Neighbouring queries end inside
    tiles; the last rank of a contiguous ring has (2R - 1) / R of a mean rank's pairs."""
    chunk = layout.chunk_length if layout.ring_degree > 1 else layout.padded_length
    tiles = -(-chunk // TILE) * TILE / chunk
    unequal = (2 * layout.ring_degree - 1) / layout.ring_degree if layout.ring_impl == "contiguous" else 1.0
    return (1 + rate.edge / keys) * tiles * unequal / rate.share


def _through_memory(
    config: RunConfig, dims: ModelDims, linear_parameters: int, tokens: int, itemsize: int, card: Card
) -> float:
    """Norms, rotary embeddings and sums, of whole hidden states on every rank; a gated MLP's product, of a rank's part.
    Under Ulysses the heads and tokens that a rank keeps are copied: 1/U of queries, keys, values and results."""
    t, rates = config.topology, card.rates
    passes = rates.passes
    if mlp_width(dims, linear_parameters) > dims.intermediate_size:
        passes += 3 * dims.intermediate_size / dims.hidden_size / t.tp
    width = passes * dims.hidden_size
    if t.ulysses > 1:
        kept = 2 * dims.head_dim * (dims.num_heads + dims.num_kv_heads) / t.ulysses
        width += rates.own_copies * 2 * kept
    return tokens * -(-dims.num_layers // t.pp) * width * itemsize / card.memory_bytes
