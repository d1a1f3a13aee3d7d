# mypy: ignore-errors
# (Triton has no types, and what @triton.jit compiles is Triton's language rather than Python.)
"""The Triton kernels of ``elementwise.py``: each reads and writes every element once.

No kernel is specialised on a number of tokens, so it is compiled once for a width and dtype, not once for each length.
"""

# Shapes: M tokens of all sequences, W columns, B batch, L tokens, H heads, D head_dim, R columns that rotate.
import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048
"""Elements a program of the element-wise kernels holds."""


@triton.jit
def _add_norm_kernel(
    first, second, fold, weight, bias, total_out, normed_out, first_stride, second_stride, eps, offset,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, FOLD: tl.constexpr, WEIGHT: tl.constexpr,
    BIAS: tl.constexpr, CENTRE: tl.constexpr, TOTAL: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One token: total = first + second, normed = norm(total), total_out = total + fold."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    total = tl.load(first + token * first_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        total += tl.load(second + token * second_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        # The norm takes the sum rounded to the model's dtype, as the model would have stored it.
        x = total.to(normed_out.dtype.element_ty).to(tl.float32)
        if CENTRE:
            x = tl.where(inside, x - tl.sum(x, 0) / WIDTH, 0.0)
        y = x * (1.0 / tl.sqrt(tl.sum(x * x, 0) / WIDTH + eps))
        if WEIGHT:
            y *= offset + tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            y += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(normed_out + token * WIDTH + columns, y.to(normed_out.dtype.element_ty), mask=inside)
    if TOTAL:
        if FOLD:
            total += tl.load(fold + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(total_out + token * WIDTH + columns, total.to(total_out.dtype.element_ty), mask=inside)


@triton.jit
def _gate_kernel(
    gate, up, out, gate_stride, up_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    x = tl.load(gate + token * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(up + token * up_stride + columns, mask=inside, other=0.0)
    if KIND == "silu":
        x = x * tl.sigmoid(x)
    elif KIND == "gelu_tanh":
        # x/2 (1 + tanh z) = x sigmoid(2 z)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(0.7071067811865476 * x))
    else:
        x = tl.maximum(x, 0.0)
    # The model rounds the activation before it multiplies.
    product = x.to(out.dtype.element_ty).to(tl.float32) * y.to(tl.float32)
    tl.store(out + token * WIDTH + columns, product.to(out.dtype.element_ty), mask=inside)


@triton.jit
def heads_of_a_token(n_tokens, HEADS: tl.constexpr):
    """(batch, token, heads [HEADS]) of a program, in a grid of all tokens x groups of HEADS heads."""
    token = tl.program_id(0).to(tl.int64)
    return token // n_tokens, token % n_tokens, tl.program_id(1) * HEADS + tl.arange(0, HEADS)


@triton.jit(do_not_specialize=["n_tokens", "heads"])
def _put_kernel(
    x, cos, sin, out, n_tokens, heads,
    x_batch_stride, x_token_stride, x_head_stride, out_batch_stride, out_token_stride, out_head_stride,
    cos_batch_stride, cos_token_stride, sin_batch_stride, sin_token_stride,
    WIDTH: tl.constexpr, ROTARY: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token. With ROTARY 0 no column rotates: a copy."""
    batch, token, head = heads_of_a_token(n_tokens, HEADS)
    column = tl.arange(0, COLUMNS)
    rotates = column < ROTARY
    inside = (head < heads)[:, None] & (column < WIDTH)[None, :]
    # The other half of the pair that a column rotates with.
    partner = tl.where(column < ROTARY // 2, column + ROTARY // 2, column - ROTARY // 2)
    source = x + batch * x_batch_stride + token * x_token_stride + head[:, None] * x_head_stride
    own = tl.load(source + column[None, :], mask=inside, other=0.0)
    other = tl.load(source + partner[None, :], mask=inside & rotates[None, :], other=0.0).to(tl.float32)
    c = tl.load(cos + batch * cos_batch_stride + token * cos_token_stride + column, mask=rotates, other=1.0)
    s = tl.load(sin + batch * sin_batch_stride + token * sin_token_stride + column, mask=rotates, other=0.0)
    s = tl.where(column < ROTARY // 2, -s.to(tl.float32), s.to(tl.float32))
    rotated = own.to(tl.float32) * c.to(tl.float32)[None, :] + other * s[None, :]
    target = out + batch * out_batch_stride + token * out_token_stride + head[:, None] * out_head_stride
    tl.store(target + column[None, :], rotated.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_tokens", "heads"])
def _rotate_kernel(
    x, cos, sin, n_tokens, heads, batch_stride, token_stride, head_stride,
    cos_batch_stride, cos_token_stride, sin_batch_stride, sin_token_stride,
    HALF: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token, in place: the program that reads a pair of columns writes it."""
    batch, token, head = heads_of_a_token(n_tokens, HEADS)
    column = tl.arange(0, COLUMNS)
    inside = (head < heads)[:, None] & (column < HALF)[None, :]
    low_at = x + batch * batch_stride + token * token_stride + head[:, None] * head_stride + column[None, :]
    low = tl.load(low_at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(low_at + HALF, mask=inside, other=0.0).to(tl.float32)
    cos_at = cos + batch * cos_batch_stride + token * cos_token_stride + column
    sin_at = sin + batch * sin_batch_stride + token * sin_token_stride + column
    c_low = tl.load(cos_at, mask=column < HALF, other=1.0).to(tl.float32)[None, :]
    c_high = tl.load(cos_at + HALF, mask=column < HALF, other=1.0).to(tl.float32)[None, :]
    s_low = tl.load(sin_at, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    s_high = tl.load(sin_at + HALF, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    tl.store(low_at, (low * c_low + high * -s_low).to(x.dtype.element_ty), mask=inside)
    tl.store(low_at + HALF, (high * c_high + low * s_high).to(x.dtype.element_ty), mask=inside)


def add_norm(
    first_MW: Tensor, second_MW: Tensor | None, fold_W: Tensor | None, weight_W: Tensor | None, bias_W: Tensor | None,
    eps: float, offset: float, centre: bool, want_total: bool, want_normed: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    tokens, width = first_MW.shape
    total = first_MW.new_empty(tokens, width) if want_total else None
    normed = first_MW.new_empty(tokens, width) if want_normed else None
    if tokens * width == 0:
        return total, normed
    second = first_MW if second_MW is None else second_MW
    block = triton.next_power_of_2(width)
    unused = first_MW
    with torch.cuda.device_of(first_MW):
        _add_norm_kernel[(tokens,)](
            first_MW, second, _or(fold_W, unused), _or(weight_W, unused), _or(bias_W, unused), _or(total, unused),
            _or(normed, unused), first_MW.stride(0), second.stride(0), eps, offset,
            WIDTH=width, BLOCK=block, ADD=second_MW is not None, FOLD=fold_W is not None, WEIGHT=weight_W is not None,
            BIAS=bias_W is not None, CENTRE=centre, TOTAL=want_total, NORM=want_normed,
            num_warps=min(16, max(1, block // 1024)),
        )  # fmt: skip
    return total, normed


def gate(kind: str, gate_MW: Tensor, up_MW: Tensor) -> Tensor:
    tokens, width = gate_MW.shape
    out = gate_MW.new_empty(tokens, width)
    if out.numel():
        with torch.cuda.device_of(gate_MW):
            _gate_kernel[(tokens, triton.cdiv(width, TILE))](
                gate_MW, up_MW, out, gate_MW.stride(0), up_MW.stride(0), WIDTH=width, BLOCK=TILE, KIND=kind
            )
    return out


def put(x_BHLD: Tensor, out_BLHD: Tensor, cos_sin: tuple[Tensor, Tensor] | None) -> None:
    batch, heads, tokens, width = x_BHLD.shape
    assert out_BLHD.shape == (batch, tokens, heads, width)
    assert x_BHLD.stride(3) == out_BLHD.stride(3) == 1 or width == 1
    if not out_BLHD.numel():
        return
    columns = triton.next_power_of_2(width)
    tile = heads_at_a_time(heads, columns)
    cos_BLR, sin_BLR = cos_sin or (x_BHLD[:1, 0, :, :0],) * 2
    # cos and sin may be the same for the whole batch.
    cos_batch, sin_batch = (t.stride(0) if t.shape[0] > 1 else 0 for t in (cos_BLR, sin_BLR))
    with torch.cuda.device_of(x_BHLD):
        _put_kernel[(batch * tokens, triton.cdiv(heads, tile))](
            x_BHLD, cos_BLR, sin_BLR, out_BLHD, tokens, heads,
            x_BHLD.stride(0), x_BHLD.stride(2), x_BHLD.stride(1),
            out_BLHD.stride(0), out_BLHD.stride(1), out_BLHD.stride(2),
            cos_batch, cos_BLR.stride(1), sin_batch, sin_BLR.stride(1),
            WIDTH=width, ROTARY=cos_BLR.shape[2], HEADS=tile, COLUMNS=columns,
        )  # fmt: skip


def rotate_(x_BHLD: Tensor, cos_BLR: Tensor, sin_BLR: Tensor) -> None:
    batch, heads, tokens, _ = x_BHLD.shape
    half = cos_BLR.shape[2] // 2
    if not x_BHLD.numel() or not half:
        return
    columns = triton.next_power_of_2(half)
    tile = heads_at_a_time(heads, 2 * columns)
    cos_batch, sin_batch = (t.stride(0) if t.shape[0] > 1 else 0 for t in (cos_BLR, sin_BLR))
    with torch.cuda.device_of(x_BHLD):
        _rotate_kernel[(batch * tokens, triton.cdiv(heads, tile))](
            x_BHLD, cos_BLR, sin_BLR, tokens, heads, x_BHLD.stride(0), x_BHLD.stride(2), x_BHLD.stride(1),
            cos_batch, cos_BLR.stride(1), sin_batch, sin_BLR.stride(1), HALF=half, HEADS=tile, COLUMNS=columns,
        )  # fmt: skip


def heads_at_a_time(heads: int, columns: int) -> int:
    """How many heads a program takes, where it holds ``columns`` columns of each."""
    return min(triton.next_power_of_2(heads), max(1, TILE // columns))


def _or(tensor: Tensor | None, unused: Tensor) -> Tensor:
    return unused if tensor is None else tensor
