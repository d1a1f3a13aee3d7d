# mypy: ignore-errors
# (Triton has no types, and what @triton.jit compiles is Triton's language rather than Python.)
"""The Triton kernels of ``decode.py``: their code, their tile sizes and their launch.

A row of a tile is one query of one head. The query heads that share a key/value head are rows of the same tile, so that
keys are read once and tensor cores multiply. The keys are split over programs (Flash-Decoding), whose results a second
kernel merges. Scores are kept in units of log 2, so that exp2 needs no further factor.
"""

# Shapes: B batch, L queries, S keys, H query heads, K key/value heads, D head_dim.
import math
import threading
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
LOG2_E = math.log2(math.e)

PROGRAMS_PER_SM = 8
"""Programs that the keys are split over: so many that little of the GPU idles while the last ones end."""
SPLIT_UNIT = 128
"""A split is a multiple of this many keys, and so of the keys of every tile size."""
MIN_SPLIT = 2 * SPLIT_UNIT
MAX_SPLITS = 128
"""The merge holds one row of all splits at a time."""
MERGED_COLUMNS = 64


@triton.jit
def _seek(
    positions, stride, start, stop, below, most, HIDDEN: tl.constexpr, WINDOW: tl.constexpr, SCAN: tl.constexpr
):  # fmt: skip
    """The first key of start .. stop - 1 with below < position <= most, with HIDDEN the first other one; else stop."""
    found = stop
    while (start < stop) & (found == stop):
        keys = start + tl.arange(0, SCAN)
        position = tl.load(positions + keys.to(tl.int64) * stride, mask=keys < stop, other=0)
        hit = position <= most
        if WINDOW:
            hit = hit & (position > below)
        if HIDDEN:
            hit = hit == 0
        found = tl.min(tl.where(hit & (keys < stop), keys, stop), 0)
        start += SCAN
    return found


@triton.jit
def _fold(
    acc, total, peak, q, k, v, k_row, v_row, k_positions, k_position, start, stop, row_positions, window,
    factor, ceiling,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Fold in BLOCK_N keys from start on. EDGE: some of them are hidden from some row, or are not below stop."""
    PADDED: tl.constexpr = BLOCK_D != HEAD_DIM
    keys = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    # Only the offset of the block's first key is a 64-bit number.
    first = tl.multiple_of(start, BLOCK_N).to(tl.int64)
    k_pointers = k + first * k_row + (keys[:, None] * k_row + columns[None, :])
    v_pointers = v + first * v_row + (keys[:, None] * v_row + columns[None, :])
    inside = (columns < HEAD_DIM)[None, :]
    if EDGE:
        there = start + keys < stop
        positions = tl.load(k_positions + (first + keys) * k_position, mask=there, other=0)
        visible = there[None, :] & (positions[None, :] <= row_positions[:, None])
        if WINDOW:
            visible = visible & (positions[None, :] > row_positions[:, None] - window)
        # A key that no row sees is not read: an empty slot may hold NaN, which a weight of 0 would not remove.
        inside = inside & (tl.max(visible.to(tl.int32), 0) > 0)[:, None]
    k_tile = tl.load(k_pointers, mask=inside, other=0.0) if EDGE or PADDED else tl.load(k_pointers)
    scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
    unit = factor
    if SOFTCAP:
        # tanh x = 1 - 2 / (1 + e^2x), which is right even where the exponential overflows. Here
        # 2x = scores * factor * ln 2.
        scores = ceiling - 2.0 * ceiling / (1.0 + tl.math.exp2(scores * factor))
        unit = 1.0
    if EDGE:
        scores = tl.where(visible, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * unit)
    # The weights of a row that has seen no key yet are 2^-inf = 0.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.math.exp2(scores * unit - base[:, None])
    decay = tl.math.exp2(peak - base)
    total = total * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None]
    v_tile = tl.load(v_pointers, mask=inside, other=0.0) if EDGE or PADDED else tl.load(v_pointers)
    acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
    return acc, total, new_peak


@triton.jit(do_not_specialize=[
    "q_position_batch", "lse_split", "lse_batch", "lse_head", "kv_heads", "group", "n_rows", "n_keys", "n_groups",
    "length", "window",
])  # fmt: skip
def attend_split(
    q, k, v, q_positions, k_positions, out, lse,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, q_position_batch, q_position,
    k_position_batch, k_position, out_split, out_batch, out_row, out_head, lse_split, lse_batch, lse_head,
    kv_heads, group, n_rows, n_keys, n_groups, length, window, factor, ceiling,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SCAN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M rows (row = query * group + head of the group) of one key/value head, and one split of keys.

    n_groups is batch * kv_heads. Neighbouring programs read the same keys, and those after them the next head's.
    """
    LN_2: tl.constexpr = 0.6931471805599453
    LOWEST: tl.constexpr = -1073741824
    HIGHEST: tl.constexpr = 1073741824
    n_tiles = tl.cdiv(n_rows, BLOCK_M)
    program = tl.program_id(0)
    tile = n_tiles - 1 - program % n_tiles  # the last queries see most keys: longest first
    which = program // n_tiles % n_groups
    split = program // n_tiles // n_groups
    batch = (which // kv_heads).to(tl.int64)
    kv_head = (which % kv_heads).to(tl.int64)
    k += batch * k_batch + kv_head * k_head
    v += batch * v_batch + kv_head * v_head
    k_positions += batch * k_position_batch

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    present = rows < n_rows
    inside = present[:, None] & (columns < HEAD_DIM)[None, :]
    query = (rows // group).to(tl.int64)
    head = kv_head * group + rows % group
    row_positions = tl.load(
        q_positions + batch * q_position_batch + query * q_position, mask=present, other=LOWEST
    )  # fmt: skip
    earliest = tl.min(tl.where(present, row_positions, HIGHEST), 0)
    latest = tl.max(row_positions, 0)
    queries = tl.load(
        q + batch * q_batch + (query * q_row + head * q_head)[:, None] + columns[None, :], mask=inside, other=0.0
    )
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # Blocks that every row sees whole are in a loop without masks, which loads ahead. After it comes one block with
    # masks, then the next block of which some row sees a key.
    first = split * length
    stop = tl.minimum(first + length, n_keys)
    seen = _seek(k_positions, k_position, first, stop, earliest - window, latest, False, WINDOW, SCAN)
    start = first + (seen - first) // BLOCK_N * BLOCK_N
    while start < stop:
        hidden = _seek(k_positions, k_position, start, stop, latest - window, earliest, True, WINDOW, SCAN)
        open_stop = start + (hidden - start) // BLOCK_N * BLOCK_N
        for block in tl.range(0, open_stop - start, BLOCK_N, num_stages=STAGES):
            acc, total, peak = _fold(
                acc, total, peak, queries, k, v, k_row, v_row, k_positions, k_position, start + block, stop,
                row_positions, window, factor, ceiling, BLOCK_N, BLOCK_D, HEAD_DIM, WINDOW, SOFTCAP, False,
            )  # fmt: skip
        acc, total, peak = _fold(
            acc, total, peak, queries, k, v, k_row, v_row, k_positions, k_position, open_stop, stop, row_positions,
            window, factor, ceiling, BLOCK_N, BLOCK_D, HEAD_DIM, WINDOW, SOFTCAP, True,
        )  # fmt: skip
        after = open_stop + BLOCK_N
        seen = _seek(k_positions, k_position, after, stop, earliest - window, latest, False, WINDOW, SCAN)
        start = after + tl.maximum(seen - after, 0) // BLOCK_N * BLOCK_N

    unseen = (peak == float("-inf")) & (total == 0.0)  # not "not total > 0": a NaN has to come out as a NaN
    total = tl.where(unseen, 1.0, total)
    acc = tl.where(unseen[:, None], 0.0, acc * (1.0 / total)[:, None])
    out += split.to(tl.int64) * out_split + batch * out_batch
    pointers = out + (query * out_row + head * out_head)[:, None] + columns[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=inside)
    result = tl.where(unseen, float("-inf"), (peak + tl.math.log2(total)) * LN_2)
    tl.store(lse + split.to(tl.int64) * lse_split + batch * lse_batch + head * lse_head + query, result, mask=present)


@triton.jit(do_not_specialize=["n_splits", "out_split", "lse_split", "n_queries", "heads"])
def merge_splits(
    split_out, split_lse, out, lse, n_splits, out_split, lse_split, n_queries, heads,
    HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS of one row of out [B, L, H, D], and its lse [B, H, L]; all tensors are contiguous, splits outermost."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    batch = row // (n_queries * heads)
    query = row // heads % n_queries
    at = (batch * heads + row % heads) * n_queries + query
    splits = tl.arange(0, SPLITS).to(tl.int64)
    there = splits < n_splits
    lses = tl.load(split_lse + splits * lse_split + at, mask=there, other=float("-inf"))
    peak = tl.max(lses, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.math.exp2((lses - base) * LOG2_E)
    total = tl.sum(weights, 0)
    unseen = total == 0.0
    total = tl.where(unseen, 1.0, total)
    share = weights * (1.0 / total)
    pointers = split_out + (splits * out_split + row * HEAD_DIM)[:, None] + columns[None, :]
    parts = tl.load(pointers, mask=there[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
    merged = tl.sum(parts * share[:, None], 0)
    tl.store(out + row * HEAD_DIM + columns, merged.to(out.dtype.element_ty), mask=columns < HEAD_DIM)
    if tl.program_id(1) == 0:
        tl.store(lse + at, tl.where(unseen, float("-inf"), base + tl.math.log2(total) / LOG2_E))


# (BLOCK_M, BLOCK_N, warps, stages) by padded head size. The first that the GPU has the shared memory for is taken.
_NARROW = {
    64: [(16, 128, 4, 3), (16, 64, 4, 4), (16, 64, 4, 2)],
    128: [(16, 64, 4, 4), (16, 128, 8, 3), (16, 64, 4, 3), (16, 64, 4, 2)],
    256: [(16, 64, 8, 3), (16, 32, 4, 4), (16, 32, 4, 2)],
    512: [(16, 32, 8, 3), (16, 32, 4, 3), (16, 32, 8, 4), (16, 64, 8, 2), (16, 32, 4, 2), (16, 32, 4, 1)],
}
"""For up to 16 rows. Warps divide a tile of scores by keys only where it has more keys than rows: BLOCK_N >= 32."""
_WIDE = {
    64: [(128, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2)],
    128: [(128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2)],
    256: [(128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2)],
    512: [(64, 32, 8, 2), (64, 32, 8, 1)],
}
"""For over 16 rows; the tiles of 128 rows for more than 64."""
_FP32 = [(16, 16, 8, 1)]
"""Without tensor cores every matrix product is unrolled: larger tiles run out of registers."""
INTERPRETER_TILE = (16, 16, 4, 1)
INTERPRETER_SMS, INTERPRETER_SCAN, SCAN = 1, 32, 2048

Tile = tuple[int, int, int, int]
_lock = threading.Lock()  # the interpreter keeps the program's index in a global
_too_large: set[tuple] = set()


def tiles(head_dim: int, rows: int, dtype: torch.dtype) -> list[Tile]:
    """Tile sizes for ``rows`` rows a key/value head, best first."""
    if dtype == torch.float32:
        return _FP32
    padded = max(64, triton.next_power_of_2(head_dim))
    if rows <= 16:
        return _NARROW[padded]
    return [tile for tile in _WIDE[padded] if tile[0] <= 64 or rows > 64] + _NARROW[padded]


def split_length(n_keys: int, groups: int, sms: int) -> int:
    """Keys a program takes, where without a split ``groups`` programs would each go over all keys."""
    splits = min(MAX_SPLITS, max(1, triton.cdiv(PROGRAMS_PER_SM * sms, groups)))
    return triton.cdiv(max(MIN_SPLIT, triton.cdiv(n_keys, splits)), SPLIT_UNIT) * SPLIT_UNIT


@cache
def _multiprocessors(device: torch.device) -> int:
    return INTERPRETER_SMS if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor,
    k_positions: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    tile: Tile | None = None,
) -> None:
    """Fill out [B, L, H, D] and lse [B, H, L], both contiguous; last dimensions are contiguous, and L, S > 0.

    Args:
        window: at most 2**30.
        tile: None for the first of ``tiles`` that fits the GPU's shared memory.
    """
    if INTERPRETED and q.dtype == torch.bfloat16:
        q, k, v = q.float(), k.float(), v.float()  # NumPy has no bfloat16: the interpreter would multiply its bits
    rows = q.shape[1] * q.shape[2] // k.shape[2]
    options = [INTERPRETER_TILE] if INTERPRETED else tiles(q.shape[3], rows, q.dtype)
    features = (q.device, q.dtype, q.shape[3], window is not None, softcap is not None)
    with _lock, torch.cuda.device_of(q):
        for option in options if tile is None else [tile]:
            if (option, features) in _too_large:
                continue
            try:
                _launch(q, k, v, q_positions, k_positions, out, lse, scale, window, softcap, option)
            except triton.runtime.errors.OutOfResources:
                _too_large.add((option, features))
            else:
                return
    raise RuntimeError(f"no tile size fits the shared memory of {q.device} at head_dim {q.shape[3]} in {q.dtype}")


def _launch(q, k, v, q_positions, k_positions, out, lse, scale, window, softcap, tile: Tile) -> None:
    batch, n_queries, heads, head_dim = q.shape
    n_keys, kv_heads = k.shape[1:3]
    block_m, block_n, warps, stages = tile
    rows = n_queries * heads // kv_heads
    groups = batch * kv_heads * triton.cdiv(rows, block_m)
    length = split_length(n_keys, groups, _multiprocessors(q.device))
    splits = triton.cdiv(n_keys, length)
    part_out, part_lse = out, lse
    if splits > 1:
        part_out = torch.empty((splits, *out.shape), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((splits, *lse.shape), dtype=torch.float32, device=q.device)
    factor, ceiling = scale * LOG2_E, 0.0
    if softcap is not None:
        factor, ceiling = 2.0 * scale / softcap * LOG2_E, softcap * LOG2_E
    attend_split[(groups * splits,)](
        q, k, v, q_positions, k_positions, part_out, part_lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *q_positions.stride(), *k_positions.stride(),
        out.numel(), *out.stride()[:3], lse.numel(), *lse.stride()[:2],
        kv_heads, heads // kv_heads, rows, n_keys, batch * kv_heads, length, window or 0, factor, ceiling,
        HEAD_DIM=head_dim, BLOCK_D=max(16, triton.next_power_of_2(head_dim)), WINDOW=window is not None,
        SOFTCAP=softcap is not None, SCAN=INTERPRETER_SCAN if INTERPRETED else SCAN,
        BLOCK_M=block_m, BLOCK_N=block_n, STAGES=stages, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        merge_splits[(batch * n_queries * heads, triton.cdiv(head_dim, MERGED_COLUMNS))](
            part_out, part_lse, out, lse, splits, out.numel(), lse.numel(), n_queries, heads,
            HEAD_DIM=head_dim, SPLITS=triton.next_power_of_2(splits), COLUMNS=MERGED_COLUMNS,
        )  # fmt: skip
