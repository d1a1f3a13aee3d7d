"""The constants of ``planning/rates.py`` that a field of a record gives, or a ratio of two, as formulas."""

from __future__ import annotations

from statistics import mean
from typing import Any

from benchmarks.planner.cases import RESULTS, model_of
from ds_ring.planning.compute_time import mean_keys
from ds_ring.planning.rates import TILE
from ds_ring.utils.results import read_json

Row = dict[str, Any]
LINK_BYTES = "link_bytes"
"""Of H100 and H200; the others are fields of ``Rates``."""


def measured() -> dict[str, float]:
    """Every measured constant by its name."""
    found = _of_transfers() | _of_all_reduces()
    link = found[LINK_BYTES]
    found["copies_among_many"] = _copies_among_many(link)
    for name in ("all_reduce_of_two", "all_reduce_of_many"):
        found[name] /= link
    found |= {"few_rows": _few_rows(), "passes": _passes(), "receiving": _receiving(found["awake"])}
    return found


def attention() -> dict[int, tuple[float, float]]:
    """(share, edge) of each head_dim, see ``rates.AttentionRate``.

    ``edge`` from one kernel at 2,500 and 10,000 tokens, causal, and ``share`` from a sustained measurement at 10,000 on
    an H100: the shorter the sequence, the more of its time goes to edges.
    """
    wide = {
        row["head_dim"]: row["share"] for row in _rows("attention_h100_wide", impl="ds_ring", causal=True, seq_q=10_000)
    }
    wide[512] = _share("attention_h100_d512", "ds_ring", 512, 10_000)
    found = {}
    for head_dim, share in wide.items():
        pair = ("attention_h100_d512", "ds_ring") if head_dim == 512 else ("attention", "cudnn")
        long, short = (_lost(_share(*pair, head_dim, n), n) for n in (10_000, 2_500))
        slower, few, many = short / long, mean_keys(2_500, None), mean_keys(10_000, None)
        edge = (slower - 1) / (1 / few - slower / many)
        found[head_dim] = (1 + edge / many) / _lost(share, 10_000), edge
    return found


def attention_in_steps(rate: tuple[float, float]) -> float:
    """``rate`` as of ``attention``, of head_dim 512. Both kinds of kernels in one trace of data parallelism."""
    row, (dims, parameters) = one("trace_dp2"), model_of("paper")
    share, edge = rate
    tokens = row["batch"] // 2 * row["length"]
    products = 2.0 * parameters * tokens / row["trace_gemm_ms"]
    keys = mean_keys(row["length"], None)
    flops = 4.0 * dims.num_heads * dims.head_dim * tokens * keys * dims.num_layers
    alone = share / (1 + edge / keys) / _tiles(row["length"])
    return flops / row["trace_attention_ms"] / products / alone


def rows(name: str) -> list[Row]:
    document = read_json(RESULTS / f"{name}.json")
    return [row for part in ("micro_batches", "sweep", "rows") for row in document.get(part) or []]


def one(name: str, **wanted: Any) -> Row:
    """The first row of a record with these values."""
    return _rows(name, **wanted)[0]


def _rows(name: str, **wanted: Any) -> list[Row]:
    return [row for row in rows(name) if all(row.get(key) == value for key, value in wanted.items())]


def _share(record: str, impl: str, head_dim: int, length: int) -> float:
    row = one(record, impl=impl, head_dim=head_dim, seq_q=length, seq_k=length, causal=True)
    return float(row["share"])


def _tiles(length: int) -> float:
    return -(-length // TILE) * TILE / length


def _lost(share: float, length: int) -> float:
    """Time over a product's, but for what queries that fill no tile cost."""
    return 1 / share / _tiles(length)


def _of_transfers() -> dict[str, float]:
    def beside(traffic: str) -> list[Row]:
        return [row for row in rows("transfers_gpu2") if row["traffic"] == traffic and row["phase"] != "warming"]

    def layer_s(traffic: str) -> float:
        return mean(row["layer_ms"] for row in beside(traffic)) / 1e3

    def transfer_s(traffic: str) -> float:
        return mean(row["transfer_ms"] for row in beside(traffic)) / 1e3

    once, four = "keys and values", "4 times keys and values"
    document = read_json(RESULTS / "transfers_gpu2.json")
    return {
        LINK_BYTES: beside(once)[0]["nbytes"] / transfer_s(once),
        "awake": layer_s(once) / layer_s("nothing") - 1,
        "beside_copies": (layer_s(four) - layer_s(once)) / (transfer_s(four) - transfer_s(once)),
        "link_sleeps_s": document["link_sleeps_after_ms"] / 1e3,
        "message_s": transfer_s("64 bytes"),
    }


def _of_all_reduces() -> dict[str, float]:
    """Of two ranks the time of two sizes gives a rate and a start; of four ranks one size, less the same start."""
    dims, _ = model_of("paper")

    def of(row: Row) -> tuple[float, float]:
        """(bytes a rank sends, seconds) of one all-reduce."""
        count = 2 * dims.num_layers * row["batch"] / row["micro_batch"]
        return row["bytes_sent_per_rank"] / count, row["comm_alone_ms"] / 1e3 / count

    (few, short), (many, long) = (of(one("gpu2", layout="tp2", micro_batch=size)) for size in (1, 2))
    rate = (many - few) / (long - short)
    start = short - few / rate
    sent, took = of(one("gpu4", layout="tp4", micro_batch=2))
    return {"all_reduce_of_two": rate, "all_reduce_start_s": start, "all_reduce_of_many": sent / (took - start)}


def _copies_among_many(link: float) -> float:
    """The busiest rank of a zigzag ring receives 2 chunks of each other one, where ranks send 3/2 on average."""
    row = one("gpu4", layout="ring4", micro_batch=4)
    return float(row["bytes_sent_per_rank"] * 4 / 3 / (row["comm_alone_ms"] / 1e3) / link)


def _few_rows() -> float:
    """The least squares of (1 + few / rows) / (1 + few / 10,000), linear in few, over sums of a layer's products."""

    def layer_ms(impl: str) -> float:
        cases = ("q, k and v", "attention's result, added", "up, GELU", "down, added")
        return sum(float(one("products_panels_h200", case=case, impl=impl)["ms"]) for case in cases)

    whole = layer_ms("PyTorch")
    points = [(1 / n - 1e-4, layer_ms(f"PyTorch, {n:,} rows at a time") / whole - 1) for n in (1280, 2560, 5120)]
    return sum(x * y for x, y in points) / sum(x * x for x, _ in points)


def _passes() -> float:
    row, (dims, _) = one("trace_dp2"), model_of("paper")
    written = row["batch"] // 2 * row["length"] * dims.num_layers * dims.hidden_size * 2
    memory_bytes = 3.0e12  # an H100's, as in planning/cards.py
    return float(row["trace_elementwise_ms"] / 1e3 * memory_bytes / written)


def _receiving(awake: float) -> float:
    """Of what showed of a pipeline by NCCL, without its bubble and without what links cost."""
    row = one("gpu2_h200_first", layout="pp2", length=10_000)
    steps = row["batch"] // row["micro_batch"]
    muted = row["step_ms"] - row["comm_exposed_ms"]
    return float((row["comm_exposed_ms"] - muted / steps) / muted - awake)
