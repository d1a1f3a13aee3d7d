# mypy: ignore-errors
# (Triton has no types, and what @triton.jit compiles is Triton's language rather than Python.)
"""The Triton kernel of ``triton_attention.py``, and its launch with the tile size that is fastest.

Streaming softmax (FlashAttention-2, arXiv 2307.08691): a program has a tile of queries of one head and goes over the
keys that the tile sees. Scores are kept in units of log 2, so that exp2 needs no further factor. Tile sizes are in
``triton_attention_tiles.py``.
"""

# Shapes: B batch, L queries, S keys, H query heads, K key/value heads, D head_dim.
import math
import threading

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_ring.kernels.triton_attention_tiles import TILES, TUNING_LENGTH, bucket, config, configs, suitable_configs

INTERPRETED = triton.knobs.runtime.interpret
LOG2_E = math.log2(math.e)
INTERPRETER_CONFIG = config(16, 16, 4, 1)


@triton.jit
def _load_tile(
    descriptor, head, row, column, n_rows, row_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, EDGE: tl.constexpr,
    USE_TMA: tl.constexpr,
):  # fmt: skip
    """ROWS x COLUMNS elements of one head from (row, column) on, 0 outside the head. EDGE: n_rows may end inside."""
    if USE_TMA:
        tile = descriptor.load([row, column])
    else:
        rows = tl.arange(0, ROWS)
        columns = column + tl.arange(0, COLUMNS)
        # Only the offset of the tile's first row is a 64-bit number.
        pointers = head + row.to(tl.int64) * row_stride + (rows[:, None] * row_stride + columns[None, :])
        if EDGE or PADDED:
            inside = (row + rows < n_rows)[:, None] & (columns < HEAD_DIM)[None, :]
            tile = tl.load(pointers, mask=inside, other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def _attend_keys(
    acc, total, peak, q, k_descriptor, v_descriptor, k_head, v_head, k_row, v_row, first, stop, hole, gap, n_keys,
    column, rows, ahead, behind, factor, ceiling,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, EDGE: tl.constexpr, USE_TMA: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Fold the keys of the blocks first, first + BLOCK_N, .. below stop into (acc, total, peak).

    EDGE: these blocks need masks. The ``gap`` keys from ``hole`` on, which need no mask, are skipped.
    """
    for block in tl.range(first, stop, BLOCK_N, num_stages=STAGES):
        start = block
        if EDGE:
            start = tl.where(block >= hole, block + gap, block)
        start = tl.multiple_of(start, BLOCK_N)
        k = _load_tile(k_descriptor, k_head, start, 0, n_keys, k_row, BLOCK_N, BLOCK_D, HEAD_DIM, PADDED, EDGE, USE_TMA)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        unit = factor
        if SOFTCAP:
            # tanh x = 1 - 2 / (1 + e^2x), which is right even where the exponential overflows. Here
            # 2x = scores * factor * ln 2. A small x is a difference of large numbers: its error is a few units of
            # rounding of the cap.
            scores = ceiling - 2.0 * ceiling / (1.0 + tl.math.exp2(scores * factor))
            unit = 1.0
        if EDGE:
            columns = start + tl.arange(0, BLOCK_N)
            visible = (columns < n_keys)[None, :]
            if CAUSAL:
                visible = visible & (columns[None, :] <= rows[:, None] + ahead)
            if WINDOW:
                visible = visible & (columns[None, :] > rows[:, None] + behind)
            scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * unit)
        # The weights of a query that has seen no key yet are 2^-inf = 0.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.math.exp2(scores * unit - base[:, None])
        decay = tl.math.exp2(peak - base)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        v = _load_tile(
            v_descriptor, v_head, start, column, n_keys, v_row, BLOCK_N, BLOCK_V, HEAD_DIM, PADDED, EDGE, USE_TMA
        )
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        peak = new_peak
    return acc, total, peak


@triton.jit(do_not_specialize=[
    "lse_batch", "lse_head", "previous_lse_batch", "previous_lse_head", "heads", "group", "n_queries", "n_keys",
    "ahead", "behind", "queries_bucket", "keys_bucket", "heads_bucket",
])  # fmt: skip
def forward(
    q, k, v, out, lse, previous_out, previous_lse,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row, out_head,
    lse_batch, lse_head, previous_batch, previous_row, previous_head, previous_lse_batch, previous_lse_head,
    heads, group, n_queries, n_keys, ahead, behind, factor, ceiling,
    queries_bucket, keys_bucket, heads_bucket,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    PREVIOUS: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, V_SPLIT: tl.constexpr, USE_TMA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M queries of one head, and BLOCK_D / V_SPLIT columns of its output.

    Key j is visible from query i when i + behind < j (WINDOW) and j <= i + ahead (CAUSAL). The buckets and ALIGNED are
    arguments only because the tile size is chosen by them.
    """
    LN_2: tl.constexpr = 0.6931471805599453
    BLOCK_V: tl.constexpr = BLOCK_D // V_SPLIT
    PADDED: tl.constexpr = BLOCK_D != HEAD_DIM
    n_tiles = tl.cdiv(n_queries, BLOCK_M)
    program = tl.program_id(0)
    head_index = program // (n_tiles * V_SPLIT)
    tile = program % (n_tiles * V_SPLIT) // V_SPLIT
    split = program % V_SPLIT  # the programs of one tile are neighbours and share its keys in the L2 cache
    if CAUSAL:
        tile = n_tiles - 1 - tile  # the last queries see most keys: longest first
    batch = (head_index // heads).to(tl.int64)
    head = (head_index % heads).to(tl.int64)
    kv_head = head // group
    q += batch * q_batch + head * q_head
    k += batch * k_batch + kv_head * k_head
    v += batch * v_batch + kv_head * v_head
    first_row = tile * BLOCK_M
    column = split * BLOCK_V
    tile_rows = tl.arange(0, BLOCK_M)
    rows = first_row + tile_rows
    columns = column + tl.arange(0, BLOCK_V)
    inside = (rows < n_queries)[:, None] & (columns < HEAD_DIM)[None, :]

    q_descriptor = 0
    k_descriptor = 0
    v_descriptor = 0
    if USE_TMA:
        q_descriptor = tl.make_tensor_descriptor(q, [n_queries, HEAD_DIM], [q_row, 1], [BLOCK_M, BLOCK_D])
        k_descriptor = tl.make_tensor_descriptor(k, [n_keys, HEAD_DIM], [k_row, 1], [BLOCK_N, BLOCK_D])
        v_descriptor = tl.make_tensor_descriptor(v, [n_keys, HEAD_DIM], [v_row, 1], [BLOCK_N, BLOCK_V])
    queries = _load_tile(
        q_descriptor, q, first_row, 0, n_queries, q_row, BLOCK_M, BLOCK_D, HEAD_DIM, PADDED, True, USE_TMA
    )
    if PREVIOUS:
        previous_lse += batch * previous_lse_batch + head * previous_lse_head
        peak = tl.load(previous_lse + rows, mask=rows < n_queries, other=float("-inf")) * (1.0 / LN_2)
        empty = peak == float("-inf")
        total = tl.where(empty, 0.0, 1.0)
        previous_out += batch * previous_batch + head * previous_head + first_row.to(tl.int64) * previous_row
        acc = tl.load(previous_out + (tile_rows[:, None] * previous_row + columns[None, :]), mask=inside, other=0.0)
        acc = tl.where(empty[:, None], 0.0, acc.to(tl.float32))
    else:
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)

    # [first, stop): blocks that some query of the tile sees; [open_first, open_stop): those that every query sees
    # whole.
    last_row = tl.minimum(first_row + BLOCK_M, n_queries) - 1
    first = 0
    stop = n_keys
    open_first = 0
    open_stop = n_keys
    if WINDOW:
        first = tl.maximum(first_row + behind + 1, 0) // BLOCK_N * BLOCK_N
        open_first = tl.cdiv(tl.maximum(last_row + behind + 1, 0), BLOCK_N) * BLOCK_N
    if CAUSAL:
        stop = tl.minimum(n_keys, tl.maximum(last_row + ahead + 1, 0))
        open_stop = tl.minimum(n_keys, tl.maximum(first_row + ahead + 1, 0))
    open_stop = tl.maximum(open_stop // BLOCK_N * BLOCK_N, open_first)
    n_open = open_stop - open_first
    acc, total, peak = _attend_keys(
        acc, total, peak, queries, k_descriptor, v_descriptor, k, v, k_row, v_row, open_first, open_stop, 0, 0, n_keys,
        column, rows, ahead, behind, factor, ceiling, BLOCK_N, BLOCK_D, BLOCK_V, HEAD_DIM, PADDED,
        CAUSAL, WINDOW, SOFTCAP, False, USE_TMA, STAGES,
    )  # fmt: skip
    acc, total, peak = _attend_keys(
        acc, total, peak, queries, k_descriptor, v_descriptor, k, v, k_row, v_row, first, stop - n_open,
        open_first, n_open, n_keys,
        column, rows, ahead, behind, factor, ceiling, BLOCK_N, BLOCK_D, BLOCK_V, HEAD_DIM, PADDED,
        CAUSAL, WINDOW, SOFTCAP, True, USE_TMA, 1,
    )  # fmt: skip

    unseen = (peak == float("-inf")) & (total == 0.0)  # not "not total > 0": a NaN has to come out as a NaN
    total = tl.where(unseen, 1.0, total)
    acc = tl.where(unseen[:, None], 0.0, acc * (1.0 / total)[:, None])
    out += batch * out_batch + head * out_head + first_row.to(tl.int64) * out_row
    tl.store(out + (tile_rows[:, None] * out_row + columns[None, :]), acc.to(out.dtype.element_ty), mask=inside)
    if split == 0:
        result = tl.where(unseen, float("-inf"), (peak + tl.math.log2(total)) * LN_2)
        tl.store(lse + batch * lse_batch + head * lse_head + rows, result, mask=rows < n_queries)


def _time(call, quantiles):
    from triton.testing import do_bench

    return do_bench(call, warmup=10, rep=40, quantiles=quantiles)


tuned_forward = triton.autotune(
    configs=[found for head_dim in TILES for found in configs(head_dim)],
    key=[
        "HEAD_DIM", "CAUSAL", "WINDOW", "SOFTCAP", "PREVIOUS", "ALIGNED",
        "queries_bucket", "keys_bucket", "heads_bucket",
    ],
    prune_configs_by={"early_config_prune": suitable_configs},
    do_bench=_time,
    cache_results=True,
)(forward)  # fmt: skip
_lock = threading.Lock()  # the autotuner keeps the call's arguments in itself; the interpreter, the program's index
_tried: set[tuple] = set()


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    previous: tuple[Tensor, Tensor] | None,
    *,
    scale: float,
    softcap: float | None,
    ahead: int | None,
    behind: int | None,
) -> None:
    """Fill out [B, L, H, D] and lse [B, H, L]; all last dimensions are contiguous, and L, S > 0.

    Args:
        previous: as in ``triton_attention.attention``.
        ahead, behind: key j is visible from query i when i + behind < j <= i + ahead; None hides nothing.
    """
    if INTERPRETED and q.dtype == torch.bfloat16:
        q, k, v = q.float(), k.float(), v.float()  # NumPy has no bfloat16: the interpreter would multiply its bits
    with _lock, torch.cuda.device_of(q):
        if not INTERPRETED:
            triton.set_allocator(_scratch)
            _choose_for_long(q, k, v, out, lse, previous, scale, softcap, ahead, behind)
        _launch(q, k, v, out, lse, previous, scale, softcap, ahead, behind)


def _choose_for_long(q, k, v, out, lse, previous, scale, softcap, ahead, behind) -> None:
    """Find the tile size of a block over TUNING_LENGTH on a part of it: trials of the whole block can take minutes."""
    n_queries, n_keys = min(q.shape[1], TUNING_LENGTH), min(k.shape[1], TUNING_LENGTH)
    if (n_queries, n_keys) == (q.shape[1], k.shape[1]):
        return
    previous_dtype = None if previous is None else previous[0].dtype
    features = (ahead is None, behind is None, softcap is None, _aligned(q, k, v))
    buckets = (bucket(n_queries), bucket(n_keys), bucket(q.shape[0] * q.shape[2], 64))
    key = (q.device, q.dtype, out.dtype, previous_dtype, q.shape[3], features, buckets)
    if key in _tried:
        return
    if ahead is not None:  # the causal mask from corner to corner of the part, the window as wide as in the block
        behind = None if behind is None else max(0, n_keys - n_queries) + behind - ahead
        ahead = max(0, n_keys - n_queries)
    elif behind is not None:
        behind = max(1 - n_queries, min(behind, n_keys - 2))
    if previous is not None:
        previous = previous[0][:, :n_queries], previous[1][:, :, :n_queries]
    # The real launch overwrites what this one writes.
    _launch(
        q[:, :n_queries], k[:, :n_keys], v[:, :n_keys], out[:, :n_queries], lse[:, :, :n_queries], previous,
        scale, softcap, ahead, behind,
    )  # fmt: skip
    _tried.add(key)


def _launch(q, k, v, out, lse, previous, scale, softcap, ahead, behind) -> None:
    batch, n_queries, heads, head_dim = q.shape
    n_keys, kv_heads = k.shape[1:3]
    previous_out, previous_lse = (None, None) if previous is None else previous
    factor, ceiling = scale * LOG2_E, 0.0
    if softcap is not None:
        factor, ceiling = 2.0 * scale / softcap * LOG2_E, softcap * LOG2_E
    arguments = (
        q, k, v, out, lse, previous_out, previous_lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *lse.stride()[:2],
        *((0, 0, 0, 0, 0) if previous is None else (*previous_out.stride()[:3], *previous_lse.stride()[:2])),
        heads, heads // kv_heads, n_queries, n_keys, ahead or 0, behind or 0, factor, ceiling,
        bucket(n_queries), bucket(n_keys), bucket(batch * heads, 64),
    )  # fmt: skip
    meta = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "CAUSAL": ahead is not None,
        "WINDOW": behind is not None,
        "SOFTCAP": softcap is not None,
        "PREVIOUS": previous is not None,
        "ALIGNED": _aligned(q, k, v),
    }

    def grid(sizes: dict) -> tuple[int]:
        return (triton.cdiv(n_queries, sizes["BLOCK_M"]) * sizes["V_SPLIT"] * batch * heads,)

    if INTERPRETED:
        forward[grid](*arguments, **meta, **INTERPRETER_CONFIG.kwargs)
    else:
        tuned_forward[grid](*arguments, **meta)


def _aligned(*tensors: Tensor) -> bool:
    """Whether the tensor memory accelerator (TMA, from Hopper on) takes them: bases and strides in 16-byte steps."""
    return all(
        t.data_ptr() % 16 == 0 and all(stride * t.element_size() % 16 == 0 for stride in t.stride()[:3])
        for t in tensors
    )


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Device memory for the tensor descriptors that programs write; PyTorch's own, so that CUDA graphs may hold it."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
