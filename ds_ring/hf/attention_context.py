"""What the attention of one model needs besides its tensors: the mesh, the current forward, and how it attends.

An attention module reaches our attention in one of two ways. Either transformers hands in q, k and v that it has made
(``attend``; the entry is ``hf/attention.py``), or the fused path makes them in the buffers that other ranks read
(``qkv_destination``, ``qkv_buffers``, ``attend_buffers``; the caller is ``fusion/kv_first.py``).
"""

# Shapes: B batch, T tokens on this rank, H query heads, K key/value heads, D head_dim.
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from ds_ring.attention.hybrid import sequence_parallel_attention
from ds_ring.attention.qkv_buffers import (
    Destination,
    ProjectionViews,
    QKVBuffers,
    open_qkv_buffers,
    projection_views,
)
from ds_ring.attention.qkv_layout import QKVLayout
from ds_ring.attention.spec import AttentionSpec
from ds_ring.config import ParallelConfig
from ds_ring.errors import DsRingError, UnsupportedModelError
from ds_ring.kv_cache.step import Step
from ds_ring.parallel.layout import SequenceLayout
from ds_ring.transport.mesh import Mesh

ATTRIBUTE = "_ds_ring_context"
BYPASSES = "does not go through transformers' attention interface, so its sequence cannot be sharded"

Attend = Callable[[Tensor, Tensor, Tensor, AttentionSpec, Tensor | None], Tensor]
"""(q [B, T, H, D], k [B, T, K, D], v, spec, sinks [H]) -> out [B, T, H, D]."""


@dataclass
class _Forward:
    """The current forward of a lane: each micro-batch in flight has one, and its own layout.

    Attributes:
        layout: how its sequences are cut; None between forwards.
        step: of a generation.
        calls: how often its attention has run, which is the number of the next layer.
        override: attends in place of our attention.
    """

    layout: SequenceLayout | None = None
    step: Step | None = None
    calls: int = 0
    override: Attend | None = None


@dataclass
class AttentionContext:
    """What the attention of one model needs besides its tensors; every module of that model refers to it.

    Attributes:
        num_heads: query heads of the whole model.
        tile_tokens: tokens that projections run at a time; 0: all at once.
    """

    mesh: Mesh
    parallel: ParallelConfig
    num_heads: int
    tile_tokens: int
    _forwards: WeakKeyDictionary[greenlet, _Forward] = field(default_factory=WeakKeyDictionary)

    @property
    def current(self) -> _Forward:
        return self._forwards.setdefault(getcurrent(), _Forward())

    @contextmanager
    def forward(
        self, layout: SequenceLayout, expected_calls: int, model_class: str, step: Step | None = None
    ) -> Iterator[None]:
        """One forward over sequences cut by ``layout``; ``step``: of a generation.

        Raises:
            UnsupportedModelError: afterwards, where the attention has not run once a layer.
        """
        self.current.layout, self.current.step, self.current.calls = layout, step, 0
        try:
            yield
        finally:
            self.current.layout = self.current.step = None
        if self.current.calls != expected_calls:
            raise UnsupportedModelError(
                f"{model_class} ran the injected attention {self.current.calls} times for {expected_calls} layers: it "
                f"{BYPASSES}"
            )

    def qkv_destination(self, batch: int, length: int) -> Destination:
        """Where the next layer's q, k and v are to be written, of so many sequences and tokens on this rank.

        Buffers are for a whole prompt's forward, where other ranks read k and v, or where projections run in tiles of
        tokens. In later steps of a generation the tokens attend to the cache. A first step with Ulysses has no k and v
        of all heads together, which the cache stores.
        """
        now, ulysses = self.current, self.mesh["ulysses"].size
        if now.layout is None or now.override is not None or now.layout.local_length != length:
            return "own_memory"
        if now.step is not None and (not now.step.is_first or ulysses > 1):
            return "own_memory"
        shared = self.mesh["ring"].size * ulysses > 1
        if not shared and not 0 < self.tile_tokens < batch * length:
            return "own_memory"
        return "ulysses_buffer" if ulysses > 1 else "ring_buffer"

    def projection_views(self, qkv_layout: QKVLayout) -> ProjectionViews | None:
        """What other ranks read of a fused projection in place; None where they cannot."""
        return projection_views(qkv_layout, self._own_heads, self.mesh["ulysses"])

    @property
    def splits_heads(self) -> bool:
        """Whether the attention of the current forward splits heads over Ulysses ranks: all but later steps do."""
        step = self.current.step
        return self.mesh.topology.ulysses > 1 and (step is None or step.is_first)

    @property
    def _own_heads(self) -> int:
        return self.num_heads // self.mesh.topology.tp

    @contextmanager
    def qkv_buffers(
        self,
        batch: int,
        length: int,
        num_kv_heads: int,
        head_dim: int,
        like: Tensor,
        projection: ProjectionViews | None = None,
    ) -> Iterator[QKVBuffers]:
        """The buffers of the layer that attends next, by ``open_qkv_buffers``; its ``qkv_destination`` is a buffer."""
        assert self.current.layout is not None
        q_shape = batch, length, self._own_heads, head_dim
        with open_qkv_buffers(
            q_shape, num_kv_heads, like,
            layout=self.current.layout, ring=self.mesh["ring"], ulysses=self.mesh["ulysses"], projection=projection,
            **self._ring_options,
        ) as buffers:  # fmt: skip
            yield buffers

    def attend_buffers(self, buffers: QKVBuffers, spec: AttentionSpec, sinks_H: Tensor | None) -> Tensor:
        """As ``attend``, of the q, k and v that were written to ``buffers``."""
        if self.current.step is not None:
            assert buffers.kv_BTKD is not None
            self.current.step.store_layer(self.current.calls, *buffers.kv_BTKD, spec.window)
        out_BTHD = buffers.attend(spec, sinks_H)
        self.current.calls += 1
        return out_BTHD

    def attend(
        self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, spec: AttentionSpec, sinks_H: Tensor | None
    ) -> Tensor:
        """out [B, T, H, D] of the layer that attends next.

        Args:
            k_BTKD, v_BTKD: of this rank's tokens.
            sinks_H: attention sinks of this rank's heads.

        Raises:
            DsRingError: outside ``forward``.
        """
        if self.current.layout is None:
            raise DsRingError("call the engine, not the model inside it: the model alone holds a part of the sequence")
        attend = self.current.override or self._attend
        out_BTHD = attend(q_BTHD, k_BTKD, v_BTKD, spec, sinks_H)
        self.current.calls += 1
        return out_BTHD

    @contextmanager
    def attending_by(self, attend: Attend) -> Iterator[None]:
        """Inside the block this lane's forward calls ``attend`` in place of our attention."""
        self.current.override = attend
        try:
            yield
        finally:
            self.current.override = None

    def _attend(
        self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, spec: AttentionSpec, sinks_H: Tensor | None
    ) -> Tensor:
        assert self.current.layout is not None
        layer, step = self.current.calls, self.current.step
        if step is not None and not step.is_first:
            return step.attend(
                layer, q_BTHD, k_BTKD, v_BTKD, spec=spec, transport=self.mesh["sp"], sinks_H=sinks_H,
                variant=self.parallel.ring_variant,
            )  # fmt: skip
        if step is not None:
            step.store_layer(layer, k_BTKD, v_BTKD, spec.window)
        return sequence_parallel_attention(
            q_BTHD, k_BTKD, v_BTKD,
            layout=self.current.layout, spec=spec, sinks_H=sinks_H,
            ring=self.mesh["ring"], ulysses=self.mesh["ulysses"], **self._ring_options,
        )  # fmt: skip

    @property
    def _ring_options(self) -> dict[str, Any]:
        p = self.parallel
        return {"variant": p.ring_variant, "gather_limit_bytes": p.gather_limit_mib << 20}


def context_of(module: nn.Module) -> AttentionContext | None:
    """The context of an injected model's module."""
    context = getattr(module, ATTRIBUTE, None)
    return context if isinstance(context, AttentionContext) else None
