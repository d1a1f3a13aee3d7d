"""What the attention of one model needs besides its tensors: the mesh, the present forward, who attends how."""

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
from ds_ring.attention.qkv_buffers import ProjectionViews, QKVBuffers, open_qkv_buffers, projection_views
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
"""(q [B, T, H, D], k [B, T, K, D], v, what is asked, sinks [H]) -> out [B, T, H, D]."""


@dataclass
class _Forward:
    """The present forward of a lane: micro-batches in flight may have layouts of their own."""

    layout: SequenceLayout | None = None
    step: Step | None = None
    calls: int = 0
    instead: Attend | None = None


@dataclass
class AttentionContext:
    """What the attention of one model needs besides its tensors; every module of that model refers to it.

    Attributes:
        num_heads: query heads of the whole model.
        block_rows: rows that projections run at a time; 0: all at once.
    """

    mesh: Mesh
    parallel: ParallelConfig
    num_heads: int
    block_rows: int
    _forwards: WeakKeyDictionary[greenlet, _Forward] = field(default_factory=WeakKeyDictionary)

    @property
    def present(self) -> _Forward:
        return self._forwards.setdefault(getcurrent(), _Forward())

    @contextmanager
    def forward(
        self, layout: SequenceLayout, expected_calls: int, model_class: str, step: Step | None = None
    ) -> Iterator[None]:
        """One forward over sequences cut by ``layout``, with ``step`` as one of a generation; afterwards the attention
        must have run once a layer."""
        self.present.layout, self.present.step, self.present.calls = layout, step, 0
        try:
            yield
        finally:
            self.present.layout = self.present.step = None
        if self.present.calls != expected_calls:
            raise UnsupportedModelError(
                f"{model_class} ran the injected attention {self.present.calls} times for {expected_calls} layers: it "
                f"{BYPASSES}"
            )

    def has_qkv_buffers(self, batch: int, length: int) -> bool:
        """Whether a layer of this forward, with so many sequences and tokens on this rank, writes its queries, keys and
        values where they belong: where peers get them, or block by block."""
        now = self.present
        if now.layout is None or now.instead is not None or now.layout.local_length != length:
            return False
        if now.step is not None and (not now.step.is_first or self.mesh["ulysses"].size > 1):
            return False  # the cache is attended to instead, or wants whole keys that lie nowhere
        shared = self.mesh["ring"].size * self.mesh["ulysses"].size > 1
        return shared or 0 < self.block_rows < batch * length

    def projection_views(self, qkv_layout: QKVLayout) -> ProjectionViews | None:
        """What peers take of a projection as it lies; None where the place of this layer may not be it."""
        return projection_views(qkv_layout, self._own_heads, qkv_layout.k_BTKD.shape[2], self.mesh["ulysses"])

    @property
    def trades_heads(self) -> bool:
        """Whether the attention of the present forward shares heads among Ulysses ranks, as a first pass does."""
        step = self.present.step
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
        projected: ProjectionViews | None = None,
    ) -> Iterator[QKVBuffers]:
        """The place of the layer that is about to attend; only where there ``has_qkv_buffers``."""
        assert self.present.layout is not None
        q_shape = batch, length, self._own_heads, head_dim
        with open_qkv_buffers(
            q_shape, num_kv_heads, like,
            layout=self.present.layout, ring=self.mesh["ring"], ulysses=self.mesh["ulysses"], projected=projected,
            **self._ring_options,
        ) as opened:  # fmt: skip
            yield opened

    def attend_buffers(self, opened: QKVBuffers, spec: AttentionSpec, sinks_H: Tensor | None) -> Tensor:
        """As ``attend``, of what was written to a place."""
        if self.present.step is not None:
            assert opened.kv_BTKD is not None
            self.present.step.store_layer(self.present.calls, *opened.kv_BTKD, spec.window)
        out_BTHD = opened.attend(spec, sinks_H)
        self.present.calls += 1
        return out_BTHD

    def attend(
        self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, spec: AttentionSpec, sinks_H: Tensor | None
    ) -> Tensor:
        if self.present.layout is None:
            raise DsRingError("call the engine, not the model inside it: the model alone holds a part of the sequence")
        attend = self.present.instead or self._attend
        out_BTHD = attend(q_BTHD, k_BTKD, v_BTKD, spec, sinks_H)
        self.present.calls += 1
        return out_BTHD

    @contextmanager
    def attending_by(self, attend: Attend) -> Iterator[None]:
        """Inside the block this lane's forward attends by ``attend``."""
        self.present.instead = attend
        try:
            yield
        finally:
            self.present.instead = None

    def _attend(
        self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, spec: AttentionSpec, sinks_H: Tensor | None
    ) -> Tensor:
        assert self.present.layout is not None
        layer, step = self.present.calls, self.present.step
        if step is not None and not step.is_first:
            return step.attend(
                layer, q_BTHD, k_BTKD, v_BTKD, spec=spec, transport=self.mesh["sp"], sinks_H=sinks_H,
                variant=self.parallel.ring_variant,
            )  # fmt: skip
        if step is not None:
            step.store_layer(layer, k_BTKD, v_BTKD, spec.window)
        return sequence_parallel_attention(
            q_BTHD, k_BTKD, v_BTKD,
            layout=self.present.layout, spec=spec, sinks_H=sinks_H,
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
