"""What the rewriting puts into a layer's graph: modules without parameters of their own, around those of the model."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from ds_ring.fusion.recognize import Norm
from ds_ring.hf.linear import Linear
from ds_ring.kernels import elementwise
from ds_ring.kernels.elementwise import Gate


class FusedModule(nn.Module):
    def _holds(self, **held: object) -> None:
        """Attributes past nn.Module's registration: the model's modules stay the model's."""
        self.__dict__.update(held)


class AddNorm(FusedModule):
    """(a + b [+ the bias of a later projection], norm(a + b))."""

    norm: Norm
    fold: Linear | None

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self._holds(norm=norm, fold=None)

    def fold_bias_of(self, product: Linear) -> None:
        self._holds(fold=product)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        fold_W = None if self.fold is None else self.fold.bias_W
        spec = self.norm.spec, self.norm.weight_W, self.norm.bias_W
        return cast(tuple[Tensor, Tensor], elementwise.add_norm((a, b), *spec, fold_W))


class Sum(FusedModule):
    """Terms and the bias of a later projection, in memory of its own."""

    fold: Linear

    def __init__(self, fold: Linear) -> None:
        super().__init__()
        self._holds(fold=fold)

    def forward(self, *terms: Tensor) -> Tensor:
        while len(terms) > 2:
            terms = (terms[0] + terms[1], *terms[2:])
        total, _ = elementwise.add_norm(terms, None, fold_W=self.fold.bias_W)
        return cast(Tensor, total)


class AddLinear(FusedModule):
    """A projection added to a sum that holds its bias already."""

    product: Linear

    def __init__(self, product: Linear) -> None:
        super().__init__()
        self._holds(product=product)

    def forward(self, total: Tensor, x: Tensor) -> Tensor:
        return self.product.add_to_(total, x)


class LinearGelu(FusedModule):
    """A projection and the tanh GELU of it."""

    product: Linear

    def __init__(self, product: Linear) -> None:
        super().__init__()
        self._holds(product=product)

    def forward(self, x: Tensor) -> Tensor:
        return self.product.with_gelu(x)


class Gated(FusedModule):
    """``activation(gate) * up``."""

    kind: Gate

    def __init__(self, kind: Gate) -> None:
        super().__init__()
        self._holds(kind=kind)

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return elementwise.gated(self.kind, gate, up)
