"""``attn_implementation="ds_ring"``: our attention behind transformers' attention and mask interfaces."""

# Shapes, as transformers has them: B batch, H query heads, K key/value heads, l tokens on this rank, D head_dim.
from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from ds_ring.attention.hybrid import sequence_parallel_attention
from ds_ring.attention.spec import AttentionSpec
from ds_ring.attention.step import Step
from ds_ring.config import ParallelConfig
from ds_ring.errors import DsRingError, UnsupportedModelError
from ds_ring.layout import SequenceLayout
from ds_ring.transport.mesh import Mesh

NAME = "ds_ring"
_ATTRIBUTE = "_ds_ring_context"
_UNSUPPORTED = ("position_bias", "alibi")
_BYPASSES = "does not go through transformers' attention interface, so its sequence cannot be sharded"


Attend = Callable[[Tensor, Tensor, Tensor, AttentionSpec, Tensor | None], Tensor]
"""(q [B, l, H, D], k [B, l, K, D], v, what is asked, sinks [H]) -> out [B, l, H, D]."""


class _Forward(threading.local):
    """The present forward. A thread's own: micro-batches in flight may have layouts of their own."""

    layout: SequenceLayout | None = None
    step: Step | None = None
    calls: int = 0
    instead: Attend | None = None


@dataclass
class AttentionContext:
    """What the attention of one model needs besides its tensors; every module of that model refers to it."""

    mesh: Mesh
    parallel: ParallelConfig
    num_heads: int
    present: _Forward = field(default_factory=_Forward)

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
                f"{_BYPASSES}"
            )

    def attend(
        self, q_BlHD: Tensor, k_BlKD: Tensor, v_BlKD: Tensor, spec: AttentionSpec, sinks_H: Tensor | None
    ) -> Tensor:
        if self.present.layout is None:
            raise DsRingError("call the engine, not the model inside it: the model alone holds a part of the sequence")
        attend = self.present.instead or self._attend
        out_BlHD = attend(q_BlHD, k_BlKD, v_BlKD, spec, sinks_H)
        self.present.calls += 1
        return out_BlHD

    @contextmanager
    def attending_by(self, attend: Attend) -> Iterator[None]:
        """Inside the block this thread's forward attends by ``attend``."""
        self.present.instead = attend
        try:
            yield
        finally:
            self.present.instead = None

    def _attend(
        self, q_BlHD: Tensor, k_BlKD: Tensor, v_BlKD: Tensor, spec: AttentionSpec, sinks_H: Tensor | None
    ) -> Tensor:
        assert self.present.layout is not None
        layer, step, variant = self.present.calls, self.present.step, self.parallel.ring_variant
        if step is not None and not step.is_first:
            return step.attend(
                layer, q_BlHD, k_BlKD, v_BlKD, spec=spec, transport=self.mesh["sp"], sinks_H=sinks_H, variant=variant
            )
        if step is not None:
            step.store_layer(layer, k_BlKD, v_BlKD, spec.window)
        return sequence_parallel_attention(
            q_BlHD, k_BlKD, v_BlKD,
            layout=self.present.layout, spec=spec, sinks_H=sinks_H,
            ring=self.mesh["ring"], ulysses=self.mesh["ulysses"],
            variant=variant, gather_limit_bytes=self.parallel.gather_limit_mib << 20,
        )  # fmt: skip


def inject(model: PreTrainedModel, context: AttentionContext) -> None:
    """Make ``model`` use our attention with ``context``. Models are independent of one another."""
    register()
    try:
        model.set_attn_implementation(NAME)
    except ValueError as error:
        raise UnsupportedModelError(f"{type(model).__name__} does not take another attention: {error}") from None
    if model.config.get_text_config()._attn_implementation != NAME:
        # transformers only warns, and DeepSpeed would go on to shard what cannot run.
        raise UnsupportedModelError(f"{type(model).__name__} {_BYPASSES}")
    for module in model.modules():
        # Only attention modules read it, and only the model's own code knows which those are.
        setattr(module, _ATTRIBUTE, context)


def register() -> None:
    """Make the name known to transformers; doing so again changes nothing.

    It gets no mask function: causality and windows follow from the layout, and engines pack padding away before the
    model sees it. For a name that has one, transformers looks for packed sequences in the position_ids at every
    forward, and the host waits for the device to find none.
    """
    AttentionInterface.register(NAME, _attention)


def _attention(
    module: nn.Module,
    query_BHlD: Tensor,
    key_BKlD: Tensor,
    value_BKlD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    context = getattr(module, _ATTRIBUTE, None)
    if not isinstance(context, AttentionContext):
        raise DsRingError(
            f'{type(module).__name__}: attn_implementation="{NAME}" works inside an engine; load the model with '
            f"ds_ring.from_pretrained or hand it to ds_ring.init_inference"
        )
    asked = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if attention_mask is not None:
        asked.append("a mask of its own")
    if dropout:
        asked.append(f"dropout={dropout}")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        asked.append("bidirectional attention")
    if value_BKlD.shape[-1] != query_BHlD.shape[-1]:
        asked.append(f"values of {value_BKlD.shape[-1]} elements beside queries of {query_BHlD.shape[-1]}")
    if asked:
        raise UnsupportedModelError(f"{type(module).__name__} asks for {', '.join(asked)}, which cannot be sharded yet")
    tp, heads = context.mesh.topology.tp, query_BHlD.shape[1]
    if tp > 1 and heads * tp != context.num_heads:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends with {heads} heads a rank where tp_size={tp} leaves "
            f"{context.num_heads // tp} of {context.num_heads}: DeepSpeed's AutoTP does not shard it rightly"
        )
    if s_aux is not None and s_aux.shape != (context.num_heads,):
        raise UnsupportedModelError(
            f"{type(module).__name__} has attention sinks of shape {tuple(s_aux.shape)} for {context.num_heads} heads"
        )
    if s_aux is not None and tp > 1:
        # AutoTP shards linear layers only: all ranks hold the sinks of all heads.
        s_aux = s_aux.narrow(0, context.mesh.coordinate("tp") * heads, heads)
    q, k, v = (t.transpose(1, 2) for t in (query_BHlD, key_BKlD, value_BKlD))
    spec = AttentionSpec(q.shape[-1] ** -0.5 if scaling is None else float(scaling), sliding_window, softcap)
    return context.attend(q, k, v, spec, s_aux), None


@contextmanager
def float_buffers_kept(model: nn.Module) -> Iterator[None]:
    """Undo what a cast inside the block does to buffers.

    DeepSpeed's ``init_inference`` halves every buffer of the model, the rotary frequencies among them; in fp16 those
    put hidden states off by 17 % at 10,000 tokens.
    """
    kept = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    kept = {name: buffer.clone() for name, buffer in kept.items()}
    yield
    for name, buffer in kept.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        current = getattr(module, leaf)
        if current.dtype != buffer.dtype:
            setattr(module, leaf, buffer.to(current.device))


def torch_dtype(name: str) -> torch.dtype:
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]
