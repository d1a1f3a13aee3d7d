"""Decoder layers of an engine under ``torch.compile``, with our attention as an operator that Dynamo cannot look into.

The operator has a fake implementation, so a layer stays one graph: what is before attention, attention, and the rest.
Contexts are found by a number, since an operator takes tensors and numbers only. All layers of a model have the same
number, so that they share what Dynamo compiles for the first.
"""

# Shapes: B batch, L tokens, H query heads, K key/value heads, D head_dim.
from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import AttentionInterface

from ds_ring.attention.spec import AttentionSpec
from ds_ring.engine.engine import Engine
from ds_ring.hf.attention import attend_by
from ds_ring.hf.attention_context import BYPASSES, AttentionContext, context_of

NAME = "ds_ring_opaque"
_ATTRIBUTE = "_ds_ring_opaque"
_contexts: dict[int, AttentionContext] = {}


@torch.library.custom_op(
    "ds_ring_benchmarks::attend",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? sinks, float scale, int? window, float? softcap, int key) -> Tensor",
)
def _attend(
    q_BLHD: Tensor, k_BLKD: Tensor, v_BLKD: Tensor, sinks_H: Tensor | None, scale: float, window: int | None,
    softcap: float | None, key: int,
) -> Tensor:  # fmt: skip
    """By the context under ``key``; contiguous, as the fake implementation promises."""
    spec = AttentionSpec(scale, window, softcap)
    return _contexts[key].attend(q_BLHD, k_BLKD, v_BLKD, spec, sinks_H).contiguous()


@_attend.register_fake
def _fake(q_BLHD: Tensor, *_: Any) -> Tensor:
    return q_BLHD.new_empty(q_BLHD.shape)


def _attention(
    module: nn.Module, query_BHLD: Tensor, key_BKLD: Tensor, value_BKLD: Tensor, attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """As ``ds_ring.hf.attention`` has it, without what that refuses."""
    q, k, v = (t.transpose(1, 2) for t in (query_BHLD, key_BKLD, value_BKLD))
    scale = q.shape[-1] ** -0.5 if options.get("scaling") is None else options["scaling"]
    window, softcap = options.get("sliding_window"), options.get("softcap")
    return _attend(q, k, v, options.get("s_aux"), scale, window, softcap, getattr(module, _ATTRIBUTE)), None


def compile_layers(engine: Engine, mode: str, backend: str) -> None:
    """Let ``torch.compile`` run each layer's own forward; it compiles when the layer is first called."""
    context = context_of(engine.runner.decoder.layers[0])
    assert context is not None
    AttentionInterface.register(NAME, _attention)
    _contexts[key := len(_contexts)] = context
    attend_by(engine.model, NAME, _ATTRIBUTE, key, BYPASSES)
    for layer in engine.runner.decoder.layers:
        layer.forward = torch.compile(layer.forward, backend=backend, mode=mode)


def forget() -> None:
    """Let go of all compiled layers and their models."""
    _contexts.clear()
    torch._dynamo.reset()


class Compilations:
    """What Dynamo has compiled since this was made, or since ``layer`` was first run."""

    def __init__(self, layer: nn.Module) -> None:
        self._graphs, self._breaks = _graphs(), Counter(counters["graph_break"])
        self._behind_layer: list[int] = []
        self._hook = layer.register_forward_hook(lambda *_: self._behind_layer.append(_graphs()))

    def figures(self, first: bool) -> dict[str, Any]:
        """``first``: nothing had been compiled before. Then graphs of layers after the first one are recompilations,
        otherwise all are."""
        self._hook.remove()
        graphs, of_a_layer = _graphs() - self._graphs, self._behind_layer[0] - self._graphs
        breaks = Counter(counters["graph_break"]) - self._breaks
        return {
            "graphs_of_first_layer": of_a_layer, "graphs_of_all_layers": graphs,
            "recompiles": graphs - of_a_layer if first else graphs,
            "graph_breaks": breaks.total(), "break_reasons": "; ".join(breaks),
        }  # fmt: skip


def _graphs() -> int:
    """Graphs that Dynamo has handed to a backend."""
    return counters["stats"]["unique_graphs"]
