"""Linear layers of models and of DeepSpeed's AutoTP, with the operations that can be fused into the same call."""

# Shapes: M tokens of all sequences, N columns in, W columns out; activations are [..., N] and [..., W].
from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal

import torch
from deepspeed.comm import all_reduce
from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer, RowParallel
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import gelu
from transformers.pytorch_utils import Conv1D

YIELD_LANE = "yield_lane"
"""Attribute of AutoTP's layers: what to call during the all-reduce of the ranks' results."""

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Linear:
    """``x @ weight + bias`` of a module whose forward is nothing but that.

    Attributes:
        module: holds the parameters.
        parallel: how AutoTP has cut the weight over ranks. row_parallel: its input columns; the ranks' results are
            summed. column_parallel: its output columns. None: not at all.
    """

    module: nn.Module
    parallel: Literal["row_parallel", "column_parallel"] | None

    @classmethod
    def of(cls, module: nn.Module) -> Linear | None:
        """None where ``module`` is something else, has hooks, or gathers its result."""
        if module._forward_hooks or module._forward_pre_hooks:
            return None
        if _runs(module, LinearAllreduce):
            return cls(module, "row_parallel")
        if _runs(module, LinearLayer):
            communicates = module.gather_output or LinearLayer.tp_overlap_comm
            return None if communicates else cls(module, "column_parallel")
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
        """Whether this rank adds what must be added once to the sum of all ranks."""
        index: Any = self.module.tp_index if self.parallel == "row_parallel" else 0
        return bool(index == 0)

    def with_gelu(self, x: Tensor) -> Tensor:
        """GELU, the tanh approximation, of the result; on GPUs in fp16 and bf16 inside the matrix product's kernel."""
        x_MN = x.flatten(0, -2)
        if x.is_cuda and x.dtype in HALVES and len(x_MN) > 1:
            out = torch._addmm_activation(self._bias_or_zeros(), x_MN, self.weight_NW, use_gelu=True)
        else:
            out = gelu(self._product(x_MN), approximate="tanh")
        return out.view(*x.shape[:-1], out.shape[-1])

    def into(self, x: Tensor, out: Tensor) -> None:
        """Write the result to ``out``, [..., W] and contiguous."""
        x_MN, out_MW, bias = x.flatten(0, -2), out.view(-1, out.shape[-1]), self.bias_W
        if bias is None:
            torch.mm(x_MN, self.weight_NW, out=out_MW)
        else:
            torch.addmm(bias, x_MN, self.weight_NW, out=out_MW)

    def add_to_(self, total: Tensor, x: Tensor) -> Tensor:
        """``total + x @ weight``, in ``total``'s memory where possible; the bias is not added.

        Where the ranks' results are summed, the first rank alone adds ``total``.
        """
        x_MN = x.flatten(0, -2)
        if self._comes_first:
            out = total.flatten(0, -2).addmm_(x_MN, self.weight_NW).view(total.shape)
        else:
            out = (x_MN @ self.weight_NW).view(total.shape)
        return self._summed(out)

    def forward_with_bias_inside(self, x: Tensor) -> Tensor:
        """The module's own forward, without the separate pass in which AutoTP adds the bias."""
        return self._summed(functional.linear(x, self.weight_NW.t(), self.bias_W if self._comes_first else None))

    def _summed(self, partial: Tensor) -> Tensor:
        if self.parallel != "row_parallel":
            return partial
        # Both are read at each call: without a group nothing is summed, and lanes yield only while there are several.
        group, yield_lane = self.module.mp_group, getattr(self.module, YIELD_LANE, None)
        if group is None or yield_lane is None:
            summed: Tensor = RowParallel.apply(group, partial, True)
            return summed
        pending = all_reduce(partial, group=group, async_op=True)
        yield_lane()
        pending.wait()
        return partial

    def _product(self, x_MN: Tensor) -> Tensor:
        bias = self.bias_W
        return x_MN @ self.weight_NW if bias is None else torch.addmm(bias, x_MN, self.weight_NW)

    def _bias_or_zeros(self) -> Tensor:
        bias = self.bias_W
        # The fused kernel has no form without a bias.
        return self.weight_NW.new_zeros(self.weight_NW.shape[1]) if bias is None else bias


def put_bias_inside(model: nn.Module) -> int:
    """Give AutoTP's layers a forward that adds the bias within the matrix product; how many of them have a bias."""
    linears = [found for m in model.modules() if (found := Linear.of(m)) is not None and found.parallel is not None]
    for linear in linears:
        linear.module.forward = MethodType(_BiasInside(linear), linear.module)
    return len([linear for linear in linears if linear.bias_W is not None])


class _BiasInside:
    """Called as a bound forward of the linear layer's module."""

    def __init__(self, linear: Linear) -> None:
        self._linear = linear

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        return self._linear.forward_with_bias_inside(x)


def gelu_inside_agrees(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch's fused kernel computes the tanh GELU on ``device``; its documentation does not say so."""
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((64, 64), (64, 64), (64,)))
    got = torch._addmm_activation(b, x, w / 8, use_gelu=True)
    want = gelu(torch.addmm(b.float(), x.float(), w.float() / 8), approximate="tanh")
    return torch.allclose(got.float(), want, atol=2e-2, rtol=2e-2)


def _runs(module: nn.Module, kind: type[nn.Module]) -> bool:
    forward = vars(module).get("forward")
    own = forward is None or isinstance(getattr(forward, "__func__", None), _BiasInside)
    return own and type(module).forward is kind.forward
