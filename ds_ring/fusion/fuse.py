"""Fusion of one model: replaces what can be replaced at once, and traces each layer when it is first called.

The parts: ``rewrite.py`` (which operations of a layer become one), ``tiling.py`` (tiles of tokens), ``rotary.py`` and
``kv_first.py`` (attention modules).
"""

from __future__ import annotations

import logging
from collections import Counter
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from ds_ring.fusion.recognize import Norm
from ds_ring.fusion.rewrite import Rewriter
from ds_ring.fusion.rotary import fuse_rotary
from ds_ring.fusion.symbolic_trace import Untraceable, is_constant, trace
from ds_ring.fusion.tiling import tile_tail
from ds_ring.hf import linear
from ds_ring.hf.decoder import Decoder
from ds_ring.hf.tensor_slices import is_sliced
from ds_ring.kernels import elementwise

log = logging.getLogger("ds_ring")


class Fusion:
    """What was fused in one model.

    Norms, rotary embeddings and AutoTP's biases are replaced at once. A layer is traced when it is first called, since
    only then it is known which arguments the model gives it. A layer that cannot be traced runs as it is.

    Attributes:
        done: how often each fused operation was put in, by name, over all layers.
        left: why layers were left as they are.
    """

    def __init__(self, decoder: Decoder, tile_tokens: int = 0, in_place: bool = False) -> None:
        """
        Args:
            tile_tokens: tokens that a layer runs at a time after its attention; 0: all at once.
            in_place: where there are more tokens, a layer's result may be written over its input.
        """
        model = decoder.model
        parameter = next(model.parameters())
        self.done: Counter[str] = Counter()
        self.left: list[str] = []
        self.done["bias in linear"] = linear.put_bias_inside(model)
        self.done["rotary"] = fuse_rotary(model)
        self.done["norm"] = _fuse_norms(model)
        uses_kernel = parameter.is_cuda and parameter.dtype in linear.HALVES
        self._gelu_inside = not uses_kernel or linear.gelu_inside_agrees(parameter.device, parameter.dtype)
        self._where = (
            "Triton kernels" if elementwise.kernels_run_on(parameter) else f"plain PyTorch on {parameter.device}"
        )
        self._tile_tokens, self._in_place = tile_tokens, in_place
        self._untraced = len(decoder.layers)
        for layer in decoder.layers:
            if "forward" in vars(layer):
                self._note(Counter(), f"{type(layer).__name__} has a forward of its own")
            else:
                layer.forward = MethodType(_FusedForward(self), layer)

    def graph_of(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], first: bool
    ) -> nn.Module | None:
        """The layer's rewritten forward for calls like this one; None where the layer runs as it is. It takes the
        arguments that are no constants.

        Args:
            first: it is the layer's first call, which ``done`` and ``left`` count.
        """
        try:
            graph, modules = trace(layer, args, kwargs)
        except Untraceable as reason:
            if first:
                self._note(Counter(), str(reason))
            return None
        rewriter = Rewriter(graph, modules, self._gelu_inside)
        rewriter.run()
        if self._tile_tokens and rewriter.done and tile_tail(graph, modules, self._tile_tokens, self._in_place):
            rewriter.done["token tiles"] += 1
        if first:
            self._note(rewriter.done, None if rewriter.done else f"{type(layer).__name__}: nothing to fuse")
        return fx.GraphModule(modules, graph) if rewriter.done else None

    def _note(self, done: Counter[str], reason: str | None) -> None:
        self.done += done
        self.left += [] if reason is None else [reason]
        self._untraced -= 1
        if self._untraced == 0:
            log.info("%s", self)

    def __str__(self) -> str:
        done = ", ".join(f"{n} x {name}" for name, n in self.done.items() if n) or "nothing"
        left = "".join(f"; as it is: {reason}" for reason in dict.fromkeys(self.left))
        return f"fused ({self._where}): {done}{left}"


class _FusedForward:
    """Called as the bound forward of one layer.

    Keeps a graph for each combination of arguments that are None or truth values. Lengths and all other numbers are no
    part of a graph, so there are no more graphs than ways to call a layer.
    """

    def __init__(self, fusion: Fusion) -> None:
        self._fusion = fusion
        self._graphs: dict[Any, nn.Module | None] = {}

    def __call__(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if layer.training or torch.is_grad_enabled() or is_sliced(layer):
            return type(layer).forward(layer, *args, **kwargs)
        key = tuple(map(_constant, args)), tuple((name, _constant(value)) for name, value in kwargs.items())
        if key not in self._graphs:
            self._graphs[key] = self._fusion.graph_of(layer, args, kwargs, first=not self._graphs)
        graph = self._graphs[key]
        if graph is None:
            return type(layer).forward(layer, *args, **kwargs)
        return graph(*(value for value in (*args, *kwargs.values()) if not is_constant(value)))


def _constant(value: Any) -> Any:
    return value if is_constant(value) else "given"


def _fuse_norms(model: nn.Module) -> int:
    """Give norms a forward in one pass over memory; how many there were.

    An RMSNorm's own code takes several passes, and PyTorch's LayerNorm as long as those where rows are wide.
    """
    count = 0
    for module in model.modules():
        if "forward" not in vars(module) and (norm := Norm.of(module)):
            module.forward = MethodType(_FusedNorm(norm), module)
            count += 1
    return count


class _FusedNorm:
    """Called as the bound forward of one norm."""

    def __init__(self, norm: Norm) -> None:
        self._norm = norm

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        _, normed = elementwise.add_norm(
            (x,), self._norm.spec, self._norm.weight_W, self._norm.bias_W, want_total=False
        )
        assert normed is not None
        return normed
