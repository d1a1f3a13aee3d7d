"""Memory of one forward on the fullest rank, in closed form: which tensors are alive when most of them are.

Notation: T tokens of a micro-batch on a rank, n of them in a block (``workload.block_tokens``), d hidden size, q and kv
the widths of a token's queries and of its keys and values together, m of the MLP's intermediate, all of one rank's
share. Rotary tables take 2 T head_dim throughout. A fused layer (``fusion/``) holds, in elements,

- while it projects: its input and that input's norm, 2 T d; queries T q; own K and V T kv, twice where slots of peer
  memory take turns; of the projections a block, n (q + kv). In one block, others' K and V are on their way already;
- while it attends: input and norm 2 T d; queries and result 2 T q; own K and V; what is visible of others'. An fp32
  running result takes 4 bytes an element more, but for a ring of two whose kernel takes both ranks' at once, which it
  does where that result would exceed ``gather_limit_mib``;
- behind it: input and the attention's result, 2 T d; of the MLP a block, n (2 d + m), or 3 m where gated. In several
  blocks the layer's result is written over its input. Slots of peer memory stay.

In one block there is the embedding as well, T d, which transformers' decoders hold to the end; in several, layers
write over it. A ring's queries, K and V are then parts of a projection that lies where peers read it, T (q + kv) in
each of the slots that take turns; a model with three projections holds less. Alone and in one block, a module runs as
it is, and all of its projections live as long as its attention, with copies of queries and keys where those do not turn
in place. Ulysses holds what is received, T (q + kv), in place of queries, K and V, and slots for what is sent: a
projection, T (q + kv), and a result, T q. Tensor parallelism holds a sum, T d, and all of the embedding, but a part of
the head; a pipeline's stage has one of the two, hidden states in slots and those that came, 3 T d.

Where several micro-batches are in flight, the others wait while one goes through a layer. Each holds what arrives for
it, or its part of the MLP's intermediate where tensor parallelism sums up, and 5 T d: input, norm, embedding, and two
that records show, whoever shares (tests/planning/test_memory_estimate.py holds all records of two in flight against
this). Each has a slot of its own; those of Ulysses then all hold projections.

One sequence of 1,000,000 tokens of the paper's model on a ring of two: T = 500,000, q = d = 8192, kv = 16,384,
m = 32,768; T d in fp16 is 8.2 GB. In that unit, beside 0.1 for rotary tables:

| | projecting | attending | behind it |
| --- | --- | --- | --- |
| in blocks of 65,536 | 2 + 1 + 2 (one slot: ``LARGE``) + 0.4 | 2 + 2 + 2 + 2 = 8 | 2 + 0.8 + 2 |
| at once | 1 + 2 + 1 + 2 + 2 + 3 = 11 | 11 | 1 + 2 + 1 + 4 + 1 + 3 = 12 |

With 6.4 GB of weights 73.0 GB = 68.0 GiB; at once 105.8 GB = 98.5 GiB. (tests/fusion/test_tiling.py holds the sums
against tensors that are alive.)
"""

from __future__ import annotations

from ds_ring.config import RunConfig
from ds_ring.kernels.attention512 import HEAD_DIM
from ds_ring.model_dims import ModelDims
from ds_ring.parallel.degrees import stage_layers
from ds_ring.parallel.layout import SequenceLayout
from ds_ring.transport.peer_buffers import LARGE, MIN_BUFFERS
from ds_ring.weights.staging import BUFFERS as STAGED


def peak_bytes(config: RunConfig, dims: ModelDims, linear_parameters: int, micro: int, *, pulls: bool = True) -> float:
    """Bytes of weights and of one micro-batch of ``micro`` sequences; logits are those of last tokens. ``pulls``: as
    for ``in_flight``."""
    t, p, itemsize = config.topology, config.parallel, config.itemsize
    layout = SequenceLayout(config.workload.max_length, p.ring_degree, p.ulysses_degree, p.ring_impl)
    rows, d = micro * layout.local_length, dims.hidden_size
    block = min(rows, config.workload.block_tokens or rows)
    q, kv = (n * dims.head_dim / t.tp for n in (dims.num_heads, 2 * dims.num_kv_heads))
    slots, projected, lanes = 0.0, t.ring > 1 and t.ulysses == 1 and block == rows, in_flight(config, micro, pulls)
    if t.ring > 1:
        shared = rows * (q + kv if projected else kv)
        slots = shared * max(lanes, 1 if shared * itemsize >= LARGE else MIN_BUFFERS)
    foreign, running = _arriving(config, dims, rows * kv, rows * q, itemsize)
    own, held = slots or rows * kv, rows * (2 * d + 2 * dims.head_dim)
    embedding = rows * d if block == rows else 0
    held += embedding
    projecting = held + own + (foreign if block == rows else 0) + (0 if projected else rows * q + block * (q + kv))
    attending = held + rows * (q if projected else 2 * q) + own + foreign + running
    if t.sp == 1 and block == rows:
        attending = held + rows * ((q + kv) + (q + kv / 2) + q)
    if t.ulysses > 1:
        slots += rows * (lanes * (q + kv) if lanes > 1 else q + kv + q)
        foreign += rows * (q + kv)
        attending = held + rows * q + slots + foreign + running
    wide = mlp_width(dims, linear_parameters) / t.tp
    behind = rows * 2 * (d + dims.head_dim) + embedding + block * (2 * d + wide) + slots
    waiting = (lanes - 1) * (rows * (5 * d + 2 * dims.head_dim) + (block * wide if t.tp > 1 else foreign))
    summed_or_sent = rows * d * (MIN_BUFFERS + 1 if t.pp > 1 else 1 if t.tp > 1 else 0)
    layer = max(projecting, attending, behind)
    return (_weights(config, dims, linear_parameters) + layer + waiting + summed_or_sent) * itemsize


def cache_bytes(config: RunConfig, dims: ModelDims, rows: int, length: int) -> float:
    """Bytes of what the fullest rank of a replica keeps of ``rows`` sequences of ``length`` tokens: keys, values
    and, as an int32, where each token stands.

    Tokens are spread over the ranks that share them, heads and layers over tensor and pipeline parallel ones. Layers
    that see a window keep no more tokens than that; each has a slot to spare (``kv_cache/shard.py``). A continued
    conversation may hold half as much again, as its memory grows.
    """
    t, itemsize = config.topology, config.itemsize
    slots = -(-length // t.sp) + 1
    layers = [
        2 * kv_heads * head_dim / t.tp * (slots if window is None else 1 + min(slots, window))
        for (kv_heads, head_dim), window in zip(dims.heads_of_layers, dims.windows, strict=True)
    ]
    stages = [sum(layers[i] for i in stage_layers(len(layers), t.pp, stage)) for stage in range(t.pp)]
    return rows * (max(stages) * itemsize + 4 * slots)


def _weights(config: RunConfig, dims: ModelDims, linear_parameters: int) -> float:
    """Parameters of the fullest rank: the embedding is whole wherever it is, the head is tensor parallel. Where ranks
    hold weights between them: this rank's part, unless the host has it, and two layers that are whole."""
    t, table = config.topology, dims.vocab_size * dims.hidden_size
    if config.weights != "whole":
        own = linear_parameters / t.weights if config.weights == "sharded" else 0
        return own + min(STAGED, dims.num_layers) * linear_parameters / dims.num_layers + 2 * table / t.weights
    return linear_parameters / (t.pp * t.tp) + (table if t.pp > 1 else table + table / t.tp)


def in_flight(config: RunConfig, micro: int, pulls: bool = True) -> int:
    """How many micro-batches of ``micro`` sequences are. ``pulls``: whether a copy engine serves an axis that shares
    sequences, as on GPUs of one host, which ``interleave=auto`` asks for."""
    t, ring = config.topology, config.ring
    by_copy_engine = ring.interleave == "auto" and t.sp > 1 and pulls and ring.transport != "process_group"
    if t.pp > 1 or t.sp * t.tp == 1 or not (ring.interleave == "on" or by_copy_engine):
        return 1
    return min(ring.in_flight if t.sp > 1 else 2, config.micro_batches(micro))


def _arriving(config: RunConfig, dims: ModelDims, own: float, out: float, itemsize: int) -> tuple[float, float]:
    """Elements of others' K and V, and of the fp32 result that they are folded into beside the final one."""
    ring = config.topology.ring
    if own * ring * itemsize <= config.parallel.gather_limit_mib << 20:
        return own * (ring - 1), 0.0
    in_one_call = ring <= 2 and dims.head_dim == HEAD_DIM and out * 4 > config.parallel.gather_limit_mib << 20
    return own * min(ring - 1, 2), 0.0 if in_one_call or ring == 1 else out * 4 / itemsize


def mlp_width(dims: ModelDims, linear_parameters: int) -> float:
    """Width of what an MLP holds beside its input and its result: one intermediate, or a gated one's three."""
    attention = 2 * dims.hidden_size * dims.head_dim * (dims.num_heads + dims.num_kv_heads)
    products = (linear_parameters / dims.num_layers - attention) / (dims.hidden_size * dims.intermediate_size)
    return dims.intermediate_size * (1 if products < 2.5 else 3)
