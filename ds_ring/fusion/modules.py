"""Fused operations that the rewriting puts into a layer's graph: modules without parameters, around the model's own."""

# Shapes: W columns; activations are [..., W].
from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from ds_ring.fusion.recognize import Norm
from ds_ring.hf.linear import Linear
from ds_ring.kernels import elementwise
from ds_ring.kernels.elementwise import Activation


class FusedOp(nn.Module):
    """A module whose attributes are not registered with nn.Module: the model's modules stay the model's."""

    def _hold(self, **attributes: object) -> None:
        self.__dict__.update(attributes)


class AddNorm(FusedOp):
    """(a + b [+ the bias of a later linear layer], norm(a + b))."""

    norm: Norm
    fold: Linear | None

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self._hold(norm=norm, fold=None)

    def fold_bias_of(self, linear: Linear) -> None:
        self._hold(fold=linear)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        fold_W = None if self.fold is None else self.fold.bias_W
        spec = self.norm.spec, self.norm.weight_W, self.norm.bias_W
        return cast(tuple[Tensor, Tensor], elementwise.add_norm((a, b), *spec, fold_W))


class Sum(FusedOp):
    """The sum of terms and of the bias of a later linear layer, in new memory."""

    fold: Linear

    def __init__(self, fold: Linear) -> None:
        super().__init__()
        self._hold(fold=fold)

    def forward(self, *terms: Tensor) -> Tensor:
        while len(terms) > 2:
            terms = (terms[0] + terms[1], *terms[2:])
        total, _ = elementwise.add_norm(terms, None, fold_W=self.fold.bias_W)
        return cast(Tensor, total)


class AddLinear(FusedOp):
    """A linear layer added to a sum that holds its bias already."""

    linear: Linear

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self._hold(linear=linear)

    def forward(self, total: Tensor, x: Tensor) -> Tensor:
        return self.linear.add_to_(total, x)


class LinearGelu(FusedOp):
    """A linear layer and the tanh GELU of its result."""

    linear: Linear

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self._hold(linear=linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear.with_gelu(x)


class Gated(FusedOp):
    """``activation(gate) * up``."""

    activation: Activation

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self._hold(activation=activation)

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return elementwise.gated(self.activation, gate, up)
