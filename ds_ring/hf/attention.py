"""``attn_implementation="ds_ring"``: our attention as one of transformers' attention functions.

``_attention`` is where q, k and v enter on the unfused path. On the fused path they do not come this way: see
``fusion/kv_first.py``.
"""

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
    """Make ``model`` use the attention function registered as ``name``.

    Args:
        attribute, value: set on every module of the model. The attention function reads it from the module that calls.
        bypasses: what to say of a model that does not call attention functions.

    Raises:
        UnsupportedModelError: the model does not take another attention function, or does not call any.
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
    """Register our attention function with transformers; to do so again changes nothing.

    The name gets no mask function. Causality and windows follow from the layout, and engines remove padding before the
    model sees it. For a name with a mask function, transformers searches the position_ids for packed sequences in every
    forward, and the host would wait for the device each time.
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
    """The entry of the unfused path: transformers calls this with q, k and v that an attention module has made.

    On the fused path q, k and v are made in another place, and this function is not called. Where other ranks read
    them, or projections run in tiles, ``fusion/kv_first.py`` runs the module's projections itself, writes k and v to
    the buffers of ``attention/qkv_buffers.py``, starts their transfer, then makes q, and ends in
    ``AttentionContext.attend_buffers``. Which path a layer takes in a forward is decided in ``fusion/qkv_plan.py``.
    """
    q, k, v = (t.transpose(1, 2) for t in (query_BHTD, key_BKTD, value_BKTD))
    context, spec, sinks_H = check_call(module, q.shape, v.shape, attention_mask, kwargs)
    return context.attend(q, k, v, spec, sinks_H), None


def check_call(
    module: nn.Module,
    q_shape: Sequence[int],
    v_shape: Sequence[int],
    attention_mask: Tensor | None,
    options: Mapping[str, Any],
) -> tuple[AttentionContext, AttentionSpec, Tensor | None]:
    """(context, spec, this rank's sinks) of one call of the attention function by ``module``, checked.

    Args:
        q_shape, v_shape: [B, T, H, D], [B, T, K, D].
        options: the call's keyword arguments, as transformers names them.

    Raises:
        DsRingError: the model is not inside an engine.
        UnsupportedModelError: the call needs what cannot be sharded; the error names it.
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
    if context.splits_heads and heads % ulysses:
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

    DeepSpeed's ``init_inference`` casts every buffer of the model, the rotary frequencies among them. In fp16 those
    change hidden states by 17 % at 10,000 tokens.
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
