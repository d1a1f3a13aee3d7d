# mypy: ignore-errors
# (Triton has no types, and what @triton.jit compiles is Triton's language rather than Python.)
"""The Triton kernel of ``attention/merge.py``: two partial attention results into one, in one pass over memory."""

# Shapes: B batch, L queries, H heads, D head_dim.
import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_ring.kernels.elementwise_kernel import heads_at_a_time, heads_of_a_token


@triton.jit(do_not_specialize=["n_queries", "heads"])
def _merge_kernel(
    out, lse, first, first_lse, second, second_lse, n_queries, heads,
    out_batch, out_query, out_head, lse_batch, lse_head, lse_query,
    first_batch, first_query, first_head, first_lse_batch, first_lse_head, first_lse_query,
    second_batch, second_query, second_head, second_lse_batch, second_lse_head, second_lse_query,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one query. The program that writes an element has read it, so ``out`` may be one of the inputs."""
    batch, query, head = heads_of_a_token(n_queries, HEADS)
    column = tl.arange(0, COLUMNS)
    there = head < heads
    inside = there[:, None] & (column < WIDTH)[None, :]

    a_at = first_lse + batch * first_lse_batch + query * first_lse_query + head * first_lse_head
    b_at = second_lse + batch * second_lse_batch + query * second_lse_query + head * second_lse_head
    a_lse = tl.load(a_at, mask=there, other=0.0)
    b_lse = tl.load(b_at, mask=there, other=0.0)
    # Equal infinities have no difference. Where both are -inf, no key was seen, and the first result stays; where both
    # are +inf, scores overflowed, and the second result takes all the weight.
    alike = a_lse == b_lse
    gap = tl.where(alike, 0.0, b_lse - a_lse)
    weight = tl.where(alike & (tl.abs(b_lse) == float("inf")), (b_lse > 0).to(tl.float32), tl.sigmoid(gap))[:, None]
    total = tl.maximum(a_lse, b_lse) + tl.log(1.0 + tl.exp(-tl.abs(gap)))

    a_row = first + batch * first_batch + query * first_query + head[:, None] * first_head
    b_row = second + batch * second_batch + query * second_query + head[:, None] * second_head
    a = tl.load(a_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    # Interpolated from the nearer end, so that weights of 0 and 1 give exactly one of the two.
    merged = tl.where(weight < 0.5, a + weight * (b - a), b - (1.0 - weight) * (b - a))
    out_row = out + batch * out_batch + query * out_query + head[:, None] * out_head
    tl.store(out_row + column[None, :], merged.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + batch * lse_batch + query * lse_query + head * lse_head, total, mask=there)


def merge(
    out_BLHD: Tensor, lse_BHL: Tensor, first_BLHD: Tensor, first_lse_BHL: Tensor, second_BLHD: Tensor,
    second_lse_BHL: Tensor,
) -> None:  # fmt: skip
    """Write the merged (out, lse) of (first, first_lse) and (second, second_lse).

    Any float dtypes, any strides with a contiguous last dimension; all lse are fp32.
    """
    batch, queries, heads, width = out_BLHD.shape
    if not out_BLHD.numel():
        return
    results, lses = (out_BLHD, first_BLHD, second_BLHD), (lse_BHL, first_lse_BHL, second_lse_BHL)
    assert all(t.shape == out_BLHD.shape and t.stride(3) == 1 for t in results)
    assert all(t.shape == (batch, heads, queries) and t.dtype == torch.float32 for t in lses)
    columns = triton.next_power_of_2(width)
    tile = heads_at_a_time(heads, columns)
    strides = [s for result, lse in zip(results, lses, strict=True) for s in (*result.stride()[:3], *lse.stride())]
    with torch.cuda.device_of(out_BLHD):
        _merge_kernel[(batch * queries, triton.cdiv(heads, tile))](
            out_BLHD, lse_BHL, first_BLHD, first_lse_BHL, second_BLHD, second_lse_BHL, queries, heads, *strides,
            WIDTH=width, HEADS=tile, COLUMNS=columns,
        )  # fmt: skip
