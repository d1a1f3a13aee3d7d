"""What a small module computes: found by its results on samples, not by its class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from ds_ring.kernels.elementwise import Activation, NormSpec, activate, normalise


def activation_of(module: nn.Module) -> Activation | None:
    """The activation that ``module`` is; None for anything else."""
    if next(module.children(), None) is not None or next(module.parameters(), None) is not None:
        return None
    # Wide enough to show those that clip, dense enough to tell the exact GELU from its tanh approximation: 5e-4.
    x = torch.linspace(-64, 64, 4001)
    try:
        with torch.inference_mode():
            got = module(x)
    except Exception:  # not a function of one tensor
        return None
    if not isinstance(got, Tensor) or got.shape != x.shape:
        return None
    return next((name for name in get_args(Activation) if torch.allclose(got, activate(name, x), atol=1e-5)), None)


@dataclass(frozen=True)
class Norm:
    """A LayerNorm or an RMSNorm. Its parameters are read from the module at each use."""

    module: nn.Module
    spec: NormSpec

    @property
    def weight_W(self) -> Tensor | None:
        weight = getattr(self.module, "weight", None)
        assert weight is None or isinstance(weight, Tensor)
        return weight

    @property
    def bias_W(self) -> Tensor | None:
        bias = getattr(self.module, "bias", None)
        assert bias is None or isinstance(bias, Tensor)
        return bias

    @classmethod
    def of(cls, module: nn.Module) -> Norm | None:
        """None where ``module`` is no norm over the last dimension."""
        names = {name for name, _ in module.named_parameters()}
        if "weight" not in names or not names <= {"weight", "bias"} or next(module.children(), None) is not None:
            return None
        weight = module.get_parameter("weight")
        eps = next((e for name in ("eps", "variance_epsilon") if (e := getattr(module, name, None)) is not None), None)
        if weight.dim() != 1 or not isinstance(eps, float) or weight.is_meta:
            return None
        return next((found for found in _candidates(module, eps) if found._agrees_with_the_module()), None)

    def _agrees_with_the_module(self) -> bool:
        weight = self.weight_W
        assert weight is not None
        generator = torch.Generator().manual_seed(0)
        tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
        # The second sample is small enough for eps to count.
        for scale in (1.0, self.spec.eps**0.5):
            x = (scale * (1 + torch.randn(3, weight.shape[0], generator=generator))).to(weight.device, weight.dtype)
            try:
                with torch.inference_mode():
                    got, want = self.module(x), normalise(x, self.spec, weight, self.bias_W)
            except Exception:  # not a function of one tensor
                return False
            if not isinstance(got, Tensor) or got.shape != want.shape:
                return False
            if not torch.allclose(got.float(), want.float(), rtol=tolerance, atol=tolerance):
                return False
        return True


def _candidates(module: nn.Module, eps: float) -> list[Norm]:
    return [
        Norm(module, NormSpec(centred, offset, eps)) for centred, offset in ((True, 0.0), (False, 0.0), (False, 1.0))
    ]
