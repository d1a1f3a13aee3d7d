"""Matrix products as models and DeepSpeed's AutoTP hold them, with what follows or precedes them in the same call."""

# Shapes: N columns in, W columns out; activations are [..., N] and [..., W].
from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal

import torch
from deepspeed.comm import all_reduce
from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer, RowParallel
from torch import Tensor, nn
from torch.nn.functional import gelu, linear
from transformers.pytorch_utils import Conv1D

HAND_OVER = "hand_over"
"""Attribute of AutoTP's layers: what to call while ranks' results are being summed."""

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Linear:
    """``x @ weight + bias`` of a module whose forward is nothing but that.

    Attributes:
        module: holds the parameters.
        split: which dimension AutoTP has cut over ranks: that of the columns in (the ranks' results are summed), of
            the columns out, or none.
    """

    module: nn.Module
    split: Literal["in", "out"] | None

    @classmethod
    def of(cls, module: nn.Module) -> Linear | None:
        if module._forward_hooks or module._forward_pre_hooks:
            return None
        if _runs(module, LinearAllreduce):
            return cls(module, "in")
        if _runs(module, LinearLayer):
            plain = not module.gather_output and not LinearLayer.tp_overlap_comm
            return cls(module, "out") if plain else None
        if type(module) in (nn.Linear, Conv1D) and "forward" not in vars(module):
            return cls(module, None)
        return None

    @property
    def bias_W(self) -> Tensor | None:
        bias: Any = self.module.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    @property
    def weight_NW(self) -> Tensor:
        weight: Any = self.module.weight
        assert isinstance(weight, Tensor)
        return weight if isinstance(self.module, Conv1D) else weight.t()

    @property
    def _comes_first(self) -> bool:
        """Whether this rank's result brings in what must be added once."""
        index: Any = self.module.tp_index if self.split == "in" else 0
        return bool(index == 0)

    def with_gelu(self, x: Tensor) -> Tensor:
        """GELU, the tanh approximation, of the product; on GPUs in fp16 and bf16 inside the product's own kernel."""
        rows = x.flatten(0, -2)
        if x.is_cuda and x.dtype in HALVES and len(rows) > 1:
            out = torch._addmm_activation(self._bias_or_zeros(), rows, self.weight_NW, use_gelu=True)
        else:
            out = gelu(self._plain(rows), approximate="tanh")
        return out.view(*x.shape[:-1], out.shape[-1])

    def into(self, x: Tensor, out: Tensor) -> None:
        """The product in ``out``, [..., W] and contiguous."""
        rows, out_rows, bias = x.flatten(0, -2), out.view(-1, out.shape[-1]), self.bias_W
        if bias is None:
            torch.mm(rows, self.weight_NW, out=out_rows)
        else:
            torch.addmm(bias, rows, self.weight_NW, out=out_rows)

    def add_to_(self, total: Tensor, x: Tensor) -> Tensor:
        """``total + x @ weight``, in ``total``'s memory where that can be; its bias is not added.

        Where the ranks' results are summed, the first of them alone brings ``total`` in.
        """
        rows = x.flatten(0, -2)
        if self._comes_first:
            out = total.flatten(0, -2).addmm_(rows, self.weight_NW).view(total.shape)
        else:
            out = (rows @ self.weight_NW).view(total.shape)
        return self._summed(out)

    def forward_with_bias_inside(self, x: Tensor) -> Tensor:
        """The module's own forward, but for AutoTP's separate pass that adds the bias."""
        return self._summed(linear(x, self.weight_NW.t(), self.bias_W if self._comes_first else None))

    def _summed(self, partial: Tensor) -> Tensor:
        if self.split != "in":
            return partial
        # Both are read at each call: without a group nothing is summed, and the hand-over is there while lanes run.
        group, hand_over = self.module.mp_group, getattr(self.module, HAND_OVER, None)
        if group is None or hand_over is None:
            summed: Tensor = RowParallel.apply(group, partial, True)
            return summed
        under_way = all_reduce(partial, group=group, async_op=True)
        hand_over()
        under_way.wait()
        return partial

    def _plain(self, rows: Tensor) -> Tensor:
        bias = self.bias_W
        return rows @ self.weight_NW if bias is None else torch.addmm(bias, rows, self.weight_NW)

    def _bias_or_zeros(self) -> Tensor:
        bias = self.bias_W
        # The fused kernel has no form without a bias.
        return self.weight_NW.new_zeros(self.weight_NW.shape[1]) if bias is None else bias


def put_bias_inside(model: nn.Module) -> int:
    """Give AutoTP's layers a forward that adds the bias within the product; how many there were."""
    products = [p for m in model.modules() if (p := Linear.of(m)) is not None and p.split is not None]
    for product in products:
        product.module.forward = MethodType(_BiasInside(product), product.module)
    return len([p for p in products if p.bias_W is not None])


class _BiasInside:
    """Called as a bound method, of the module it serves."""

    def __init__(self, product: Linear) -> None:
        self._product = product

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        return self._product.forward_with_bias_inside(x)


def gelu_inside_agrees(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the product's kernel computes the tanh GELU here, as its documentation does not say."""
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((64, 64), (64, 64), (64,)))
    got = torch._addmm_activation(b, x, w / 8, use_gelu=True)
    want = gelu(torch.addmm(b.float(), x.float(), w.float() / 8), approximate="tanh")
    return torch.allclose(got.float(), want, atol=2e-2, rtol=2e-2)


def _runs(module: nn.Module, kind: type[nn.Module]) -> bool:
    forward = vars(module).get("forward")
    own = forward is None or isinstance(getattr(forward, "__func__", None), _BiasInside)
    return own and type(module).forward is kind.forward
