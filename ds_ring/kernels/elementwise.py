"""The element-wise operations between matrix products, each in one pass over memory.

They are norms with the addition before them, the gates of gated MLPs, and rotary position embeddings. On GPUs they are
Triton kernels (``elementwise_kernel.py``), elsewhere the same formulas in PyTorch. To import this module, Triton is not
needed.
"""

# Shapes: M tokens of all sequences, W columns, B batch, L tokens, H query heads, K key/value heads, D head_dim, R
# columns that rotate.
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, relu, silu

from ds_ring.kernels.triton_probe import triton_usable

Activation = Literal["silu", "gelu_tanh", "gelu", "relu"]

CosSin = tuple[Tensor, Tensor]
"""(cos, sin), each [B or 1, L, R]."""

MAX_WIDTH = 32768
"""Most columns that the norm kernel takes: one program holds all columns of a token."""


@dataclass(frozen=True)
class NormSpec:
    """``(x - mean, where centred) / sqrt(variance + eps) * (offset + weight) + bias``, computed in fp32."""

    centred: bool
    offset: float
    eps: float


def kernels_run_on(tensor: Tensor) -> bool:
    """Whether the Triton kernels take tensors like this one. On a GPU where they cannot, a warning says why, once."""
    return tensor.is_cuda and triton_usable("element-wise work", self_test, tensor.device, tensor.dtype)


def self_test(device: torch.device, dtype: torch.dtype) -> str | None:
    """In which case of a small example the kernels' results differ from the PyTorch formulas'; None: in no case."""
    from ds_ring.kernels import elementwise_kernel

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 80, generator=generator).to(device, dtype) for _ in range(2))
    x_BHLD, angle_BLR = a.view(1, 5, 5, 16), b.view(1, 5, 5, 16)[0, :1, :, :8]
    norm = NormSpec(True, 0.0, 1e-5)
    rotated_by_kernel, rotated_by_formula, copied = (torch.empty_like(x_BHLD.transpose(1, 2)) for _ in range(3))
    in_place = x_BHLD.clone()
    _rotate_eager(x_BHLD, angle_BLR, angle_BLR, rotated_by_formula)
    elementwise_kernel.put(x_BHLD, rotated_by_kernel, (angle_BLR, angle_BLR))
    elementwise_kernel.put(x_BHLD, copied, None)
    elementwise_kernel.rotate_(in_place, angle_BLR, angle_BLR)
    got = [
        *elementwise_kernel.add_norm(a, b, b[0], a[1], b[1], norm.eps, norm.offset, norm.centred, True, True),
        *(elementwise_kernel.gate(name, a, b) for name in get_args(Activation)),
        rotated_by_kernel,
        copied,
        in_place.transpose(1, 2),
    ]
    want = [
        *_add_norm_eager((a, b), norm, a[1], b[1], b[0], True),
        *(activate(name, a) * b for name in get_args(Activation)),
        rotated_by_formula,
        x_BHLD.transpose(1, 2),
        rotated_by_formula,
    ]
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    near = [
        g is not None and w is not None and torch.allclose(g, w, atol=tolerance, rtol=tolerance)
        for g, w in zip(got, want, strict=True)
    ]
    return None if all(near) else f"their self-test fails on {device} (case {near.index(False)})"


def add_norm(
    terms: tuple[Tensor, ...],
    norm: NormSpec | None,
    weight_W: Tensor | None = None,
    bias_W: Tensor | None = None,
    fold_W: Tensor | None = None,
    want_total: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """(sum of one or two ``terms`` + ``fold_W``, norm of the sum of ``terms``), each [..., W] in the terms' dtype.

    Args:
        norm, weight_W, bias_W: None for ``norm``: the second result is None.
        fold_W: the bias of a linear layer that will be added to the sum later. It is in the sum that is returned, not
            in the sum that is normalised.
        want_total: False: the first result is None.
    """
    shape, width = terms[0].shape, terms[0].shape[-1]
    if not kernels_run_on(terms[0]) or width > MAX_WIDTH:
        return _add_norm_eager(terms, norm, weight_W, bias_W, fold_W, want_total)
    from ds_ring.kernels import elementwise_kernel

    flat = [_flat(t) for t in terms]
    spec = norm or NormSpec(False, 0.0, 0.0)
    total, normed = elementwise_kernel.add_norm(
        flat[0], flat[1] if len(flat) > 1 else None, fold_W, weight_W, bias_W, spec.eps, spec.offset, spec.centred,
        want_total, norm is not None,
    )  # fmt: skip
    return total if total is None else total.view(shape), normed if normed is None else normed.view(shape)


def gated(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """``activation(gate) * up`` for tensors [..., W]."""
    if not kernels_run_on(gate):
        return activate(activation, gate) * up
    from ds_ring.kernels import elementwise_kernel

    return elementwise_kernel.gate(activation, _flat(gate), _flat(up)).view(gate.shape)


def rotate(q_BHLD: Tensor, k_BKLD: Tensor, cos_BLR: Tensor, sin_BLR: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding by halves: column i < R/2 rotates with column i + R/2; columns from R on are copied.

    Args:
        q_BHLD, k_BKLD: any strides with a contiguous last dimension: views of a fused projection need no copy.
        cos_BLR, sin_BLR: B may be 1.

    Returns:
        The same shapes, in memory as [B, L, heads, D], in the dtype of q and k.
    """
    return rotated(q_BHLD, cos_BLR, sin_BLR), rotated(k_BKLD, cos_BLR, sin_BLR)


def rotated(x_BHLD: Tensor, cos_BLR: Tensor, sin_BLR: Tensor) -> Tensor:
    """As ``rotate``, of q or k alone."""
    batch, heads, tokens, width = x_BHLD.shape
    out_BLHD = x_BHLD.new_empty(batch, tokens, heads, width)
    put(x_BHLD, out_BLHD, (cos_BLR, sin_BLR))
    return out_BLHD.transpose(1, 2)


def put(x_BHLD: Tensor, out_BLHD: Tensor, cos_sin: CosSin | None = None) -> None:
    """Write ``x_BHLD`` to ``out_BLHD`` in one pass, rotated by ``cos_sin``; None: copied.

    Args:
        x_BHLD, out_BLHD: any strides with a contiguous last dimension; of one dtype.
    """
    if not kernels_run_on(x_BHLD):
        if cos_sin is None:
            out_BLHD.copy_(x_BHLD.transpose(1, 2))
        else:
            _rotate_eager(x_BHLD, *cos_sin, out_BLHD)
        return
    from ds_ring.kernels import elementwise_kernel

    elementwise_kernel.put(x_BHLD, out_BLHD, cos_sin)


def rotate_(x_BHLD: Tensor, cos_sin: CosSin) -> Tensor:
    """``x_BHLD`` itself, rotated in place as by ``rotate``; columns that do not rotate are not touched."""
    if kernels_run_on(x_BHLD):
        from ds_ring.kernels import elementwise_kernel

        elementwise_kernel.rotate_(x_BHLD, *cos_sin)
    else:
        x_BHLD[..., : cos_sin[0].shape[-1]] = _rotated_columns(x_BHLD, *cos_sin)
    return x_BHLD


def activate(activation: Activation, x: Tensor) -> Tensor:
    """``activation(x)`` in PyTorch."""
    if activation in ("gelu_tanh", "gelu"):
        return gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    return silu(x) if activation == "silu" else relu(x)


def normalise(x: Tensor, norm: NormSpec, weight_W: Tensor | None, bias_W: Tensor | None) -> Tensor:
    """The norm alone, in PyTorch."""
    if norm.centred and norm.offset == 0:
        return layer_norm(x, x.shape[-1:], weight_W, bias_W, norm.eps)
    y = x.float()
    if norm.centred:
        y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + norm.eps)
    if weight_W is not None:
        y = y * (norm.offset + weight_W.float())
    return (y if bias_W is None else y + bias_W.float()).to(x.dtype)


def _flat(x: Tensor) -> Tensor:
    """[M, W] with contiguous columns; a copy only where they are not."""
    return (x if x.stride(-1) == 1 else x.contiguous()).flatten(0, -2)


def _add_norm_eager(
    terms: tuple[Tensor, ...],
    norm: NormSpec | None,
    weight_W: Tensor | None,
    bias_W: Tensor | None,
    fold_W: Tensor | None,
    want_total: bool,
) -> tuple[Tensor | None, Tensor | None]:
    total = terms[0] if len(terms) == 1 else terms[0] + terms[1]
    normed = None if norm is None else normalise(total, norm, weight_W, bias_W)
    if not want_total:
        return None, normed
    # The caller may write to the sum, so it must not be one of the terms.
    return (total.clone() if len(terms) == 1 else total) if fold_W is None else total + fold_W, normed


def _rotate_eager(x_BHLD: Tensor, cos_BLR: Tensor, sin_BLR: Tensor, out_BLHD: Tensor) -> None:
    rotary, out_BHLD = cos_BLR.shape[-1], out_BLHD.transpose(1, 2)
    out_BHLD[..., :rotary] = _rotated_columns(x_BHLD, cos_BLR, sin_BLR)
    out_BHLD[..., rotary:] = x_BHLD[..., rotary:]


def _rotated_columns(x_BHLD: Tensor, cos_BLR: Tensor, sin_BLR: Tensor) -> Tensor:
    """[B, H, L, R]: only the columns that rotate."""
    half = cos_BLR.shape[-1] // 2
    low, high = x_BHLD[..., :half], x_BHLD[..., half : 2 * half]
    cos, sin = cos_BLR[:, None], sin_BLR[:, None]
    return torch.cat(
        (low * cos[..., :half] - high * sin[..., :half], high * cos[..., half:] + low * sin[..., half:]), dim=-1
    )
