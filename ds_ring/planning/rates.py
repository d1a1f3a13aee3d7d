"""The constants of predicted steps: each has a record in benchmarks/results/, or is marked as assumed.

Three kinds. *Measured*: a field of a record, or a ratio of two. *Fitted*: by least squares over the recorded steps of
two GPUs, the paper's model and 10,000 tokens (``benchmarks/planner/fit.py`` makes both kinds anew, and a test holds the
values here against it). *Assumed*: no record has it; a plan that depends on one says so.

What the numbers describe: a GPU of this kind is limited by its power, 700 W, not by its clock. So it matters less how
long kernels wait than what else takes power.

- A link that is awake takes power, and falls asleep 50 ms after its last traffic.
- While a rank waits, it saves power, and computes faster afterwards: of what it waits only a share is lost, until the
  clock is at its highest.
- Copy engines take next to nothing from kernels beside them; NCCL's kernels take SMs.
"""

from __future__ import annotations

from dataclasses import dataclass

TILE = 128
"""Queries that attention kernels work on at a time (``kernels/attention512.py``)."""


@dataclass(frozen=True)
class AttentionRate:
    """How fast a kernel attends, from the sizes of what it attends to.

    Attributes:
        share: of the rate of a large matrix product, for infinitely many keys.
        edge: keys a query whose work is lost, at a causal edge and where programs begin and end.
    """

    share: float
    edge: float
    source: str


ATTENTION = {
    64: AttentionRate(0.712, 542, "attention_h100_wide.json, attention.json"),
    128: AttentionRate(0.910, 521, "attention_h100_wide.json, attention.json"),
    256: AttentionRate(0.949, 295, "attention_h100_wide.json, attention.json"),
    512: AttentionRate(0.970, 324, "attention_h100_d512.json"),
}
"""By the largest head_dim that a kernel serves (``attention/backends/select.py``)."""
OTHER_ATTENTION = AttentionRate(0.45, 0, "assumed")
"""Our Triton kernels, for other head sizes."""


@dataclass(frozen=True)
class Rates:
    """Shares and times, of any card; rates of one card are in ``cards.py``. Sources: ``SOURCES``.

    Attributes:
        few_rows: rows at which a matrix product takes twice its time a row.
        passes: times that element-wise kernels read or write a layer's hidden states.
        attention_in_steps: rate of attention in a step over that in turn with a product, both over the product's.
        awake: share of a step that links take which are awake all the time.
        link_sleeps_s: seconds without traffic after which links sleep.
        beside_copies: seconds that kernels take longer for a second of copy-engine traffic beside them.
        copies_among_many: share of the link's rate that copy engines reach among more than two ranks.
        all_reduce_of_two, all_reduce_of_many: share of the link's rate that NCCL's all-reduces reach.
        all_reduce_start_s: seconds of an all-reduce however small it is.
        message_s: seconds of another message between GPUs of a host, however small it is.
        beside_nccl: seconds that kernels take longer for a second of NCCL traffic beside them.
        waiting: share of a short wait that is lost; the rest is made up for by a higher clock.
        highest_clock: time of a kernel on a GPU that is not limited by power, over its usual time.
        clock_lasts_s: seconds of computation for which the clock is high after a wait.
        own_copies: time of copies within a GPU over what its memory's rate allows: of the heads a Ulysses rank keeps.
        receiving: share of a pipeline stage's computation that a receive of NCCL's beside it costs.
        network_reached: share of the network's rate that NCCL reaches.
        network_message_s: seconds of a message between hosts, however small it is.
    """

    few_rows: float = 85.4
    passes: float = 8.05
    attention_in_steps: float = 0.905
    awake: float = 0.0236
    link_sleeps_s: float = 0.05
    beside_copies: float = 0.0299
    copies_among_many: float = 0.630
    all_reduce_of_two: float = 0.842
    all_reduce_of_many: float = 0.944
    all_reduce_start_s: float = 65.5e-6
    message_s: float = 14.2e-6
    beside_nccl: float = 0.345
    waiting: float = 0.657
    highest_clock: float = 0.896
    clock_lasts_s: float = 0.3
    own_copies: float = 1.68
    receiving: float = 0.0421
    network_reached: float = 0.95
    network_message_s: float = 20e-6


SOURCES = {
    "few_rows": "measured: products_panels_h200.json, ms of products in panels over those of 10,000 rows",
    "passes": "measured: trace_dp2.json, trace_elementwise_ms",
    "attention_in_steps": "measured: trace_dp2.json, trace_attention_ms and trace_gemm_ms",
    "awake": "measured: transfers_gpu2.json, layer_ms beside keys and values over beside nothing",
    "link_sleeps_s": "measured: transfers_gpu2.json, link_sleeps_after_ms",
    "beside_copies": "measured: transfers_gpu2.json, layer_ms beside 4 times keys and values over beside them once",
    "copies_among_many": "measured: gpu4.json, comm_alone_ms of ring4",
    "all_reduce_of_two": "measured: gpu2.json, comm_alone_ms of tp2 at two sizes",
    "all_reduce_of_many": "measured: gpu4.json, comm_alone_ms of tp4; assumed for more ranks than four",
    "all_reduce_start_s": "measured: gpu2.json, comm_alone_ms of tp2 at two sizes",
    "message_s": "measured: transfers_gpu2.json, transfer_ms of 64 bytes",
    "beside_nccl": "fitted; between hosts assumed to be the same",
    "waiting": "fitted",
    "highest_clock": "fitted",
    "clock_lasts_s": "assumed",
    "own_copies": "fitted",
    "receiving": "measured: gpu2_h200_first.json, comm_exposed_ms of pp2 without the bubble and links awake",
    "network_reached": "assumed",
    "network_message_s": "assumed",
}
