"""``attn_implementation="ds_ring"``: our attention behind transformers' attention interface."""

# Shapes, as transformers has them: B batch, H query heads, K key/value heads, T tokens on this rank, D head_dim.
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from ds_ring.attention.spec import AttentionSpec
from ds_ring.errors import DsRingError, UnsupportedModelError
from ds_ring.hf.attention_context import ATTRIBUTE, BYPASSES, AttentionContext, context_of

NAME = "ds_ring"
_UNSUPPORTED = ("position_bias", "alibi")


def inject(model: PreTrainedModel, context: AttentionContext) -> None:
    """Make ``model`` use our attention with ``context``. Models are independent of one another."""
    register()
    attend_by(model, NAME, ATTRIBUTE, context, BYPASSES)


def attend_by(model: PreTrainedModel, name: str, attribute: str, value: object, bypasses: str) -> None:
    """Make ``model`` use the attention registered as ``name``, which finds ``value`` on the module it is called with.

    Raises:
        UnsupportedModelError: it does not take another attention, or ``bypasses`` it.
    """
    try:
        model.set_attn_implementation(name)
    except ValueError as error:
        raise UnsupportedModelError(f"{type(model).__name__} does not take another attention: {error}") from None
    if model.config.get_text_config()._attn_implementation != name:
        # transformers only warns, and DeepSpeed would go on to shard what cannot run.
        raise UnsupportedModelError(f"{type(model).__name__} {bypasses}")
    for module in model.modules():
        # Only attention modules read it, and only the model's own code knows which those are.
        setattr(module, attribute, value)


def register() -> None:
    """Make the name known to transformers; doing so again changes nothing.

    It gets no mask function: causality and windows follow from the layout, and engines pack padding away before the
    model sees it. For a name that has one, transformers looks for packed sequences in the position_ids at every
    forward, and the host waits for the device to find none.
    """
    AttentionInterface.register(NAME, _attention)


def _attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    q, k, v = (t.transpose(1, 2) for t in (query_BHTD, key_BKTD, value_BKTD))
    context, spec, sinks_H = asked(module, q.shape, v.shape, attention_mask, kwargs)
    return context.attend(q, k, v, spec, sinks_H), None


def asked(
    module: nn.Module,
    q_shape: Sequence[int],
    v_shape: Sequence[int],
    attention_mask: Tensor | None,
    options: Mapping[str, Any],
) -> tuple[AttentionContext, AttentionSpec, Tensor | None]:
    """What ``module`` asks of the attention interface, checked: (its context, the spec, this rank's sinks).

    Args:
        q_shape, v_shape: [B, T, H, D], [B, T, K, D].
        options: the interface's keyword arguments, as transformers names them.

    Raises:
        DsRingError: not inside an engine.
        UnsupportedModelError: what cannot be sharded, by name.
    """
    context = context_of(module)
    if context is None:
        raise DsRingError(
            f'{type(module).__name__}: attn_implementation="{NAME}" works inside an engine; load the model with '
            f"ds_ring.from_pretrained or hand it to ds_ring.init_inference"
        )
    refused = [name for name in _UNSUPPORTED if options.get(name) is not None]
    if attention_mask is not None:
        refused.append("a mask of its own")
    if dropout := options.get("dropout", 0.0):
        refused.append(f"dropout={dropout}")
    is_causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        refused.append("bidirectional attention")
    if v_shape[-1] != q_shape[-1]:
        refused.append(f"values of {v_shape[-1]} elements beside queries of {q_shape[-1]}")
    if refused:
        raise UnsupportedModelError(
            f"{type(module).__name__} asks for {', '.join(refused)}, which cannot be sharded yet"
        )
    tp, heads = context.mesh.topology.tp, q_shape[2]
    if tp > 1 and heads * tp != context.num_heads:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends with {heads} heads a rank where tp_size={tp} leaves "
            f"{context.num_heads // tp} of {context.num_heads}: DeepSpeed's AutoTP does not shard it rightly"
        )
    ulysses = context.mesh.topology.ulysses
    if context.trades_heads and heads % ulysses:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends with {heads} heads, whatever its config says, which "
            f"ulysses_degree={ulysses} does not divide; share sequences by ring_degree"
        )
    sinks_H: Tensor | None = options.get("s_aux")
    if sinks_H is not None and sinks_H.shape != (context.num_heads,):
        raise UnsupportedModelError(
            f"{type(module).__name__} has attention sinks of shape {tuple(sinks_H.shape)} for {context.num_heads} heads"
        )
    if sinks_H is not None and tp > 1:
        # AutoTP shards linear layers only: all ranks hold the sinks of all heads.
        sinks_H = sinks_H.narrow(0, context.mesh.coordinate("tp") * heads, heads)
    scaling = options.get("scaling")
    scale = q_shape[-1] ** -0.5 if scaling is None else float(scaling)
    return context, AttentionSpec(scale, options.get("sliding_window"), options.get("softcap")), sinks_H


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
