"""DeepSpeed as the engines use it: ``init_inference``, and the collectives it issues inside layers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import deepspeed
import torch
from deepspeed.module_inject.fusedqkv_utils import get_fused_qkv_type
from deepspeed.module_inject.layers import (
    TensorParallel_Layer,
    Yuan_LinearAllreduce,
    Yuan_LinearLayer,
    fused_LinearLayer,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError, UnsupportedModelError
from ds_ring.hf.attention import float_buffers_kept, torch_dtype
from ds_ring.transport.base import Transport, blank

YUAN_LAYERS = (Yuan_LinearLayer, Yuan_LinearAllreduce)
THREE_BLOCKS = "glmtype"
"""AutoTP's word for a projection of all queries, all keys and all values: any class named DecoderLayer."""


class SliceGroup:
    """The part of Megatron's ``mpu`` that ``init_inference`` asks for the group that shares each layer."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def get_model_parallel_group(self) -> Any:
        return getattr(self._transport, "group", None)

    def get_model_parallel_world_size(self) -> int:
        return self._transport.size

    def get_model_parallel_rank(self) -> int:
        return self._transport.rank


def serve(model: PreTrainedModel, config: RunConfig, tensor_parallel: Transport | None = None) -> Any:
    """``deepspeed.init_inference`` with the file's own DeepSpeed keys.

    With ``tensor_parallel`` AutoTP shards the model's linear layers over that group. It must be told the group twice:
    either alone leaves the model whole without a word, or crashes.
    """
    keys = {**config.deepspeed, "dtype": torch_dtype(config.dtype)}
    keys["tensor_parallel"] = dict(keys.get("tensor_parallel") or {})
    if tensor_parallel is not None and tensor_parallel.size > 1:
        mpu = SliceGroup(tensor_parallel)
        keys["tensor_parallel"] |= {"tp_group": mpu.get_model_parallel_group(), "mpu": mpu}
    try:
        # AutoTP prints what it found; standard output belongs to results.
        with float_buffers_kept(model), redirect_stdout(sys.stderr):
            served = deepspeed.init_inference(model, config=keys)
    except ValueError as error:
        raise ConfigError(f"DeepSpeed refuses the configuration: {error}") from error
    except AssertionError as error:
        if tensor_parallel is None or tensor_parallel.size == 1:
            raise
        raise UnsupportedModelError(cannot_cut(model, str(error))) from error
    refuse_misread(model)
    return served


def refuse_misread(model: nn.Module) -> None:
    """Raise UnsupportedModelError where AutoTP goes by a part of a class's name and gives ranks others' rows: heads
    then meet keys of other heads, and logits are plausible and wrong."""
    for name, module in model.named_modules():
        if isinstance(module, YUAN_LAYERS):
            raise UnsupportedModelError(cannot_cut(model, f"it takes {name} for the Yuan model's"))
        if isinstance(module, fused_LinearLayer) and get_fused_qkv_type(module.fused_module.module) == THREE_BLOCKS:
            reason = f"it takes the rows of {name} for all queries, then all keys, then all values"
            raise UnsupportedModelError(cannot_cut(model, reason))


def cannot_cut(model: nn.Module, reason: str) -> str:
    return (
        f"{type(model).__name__} cannot be sharded by DeepSpeed's AutoTP ({reason}); "
        f"take pp_size, ring_degree or ulysses_degree instead of tp_size"
    )


@contextmanager
def muted_tensor_parallel(model: nn.Module) -> Iterator[None]:
    """AutoTP's layers without their all-reduces."""
    layers = [m for m in model.modules() if isinstance(m, TensorParallel_Layer)]
    groups = [m.mp_group for m in layers]
    for layer in layers:
        layer.mp_group = None
    try:
        yield
    finally:
        for layer, group in zip(layers, groups, strict=True):
            layer.mp_group = group


class AllReduceMeter(TorchDispatchMode):
    """Enters the all-reduces that DeepSpeed issues by itself into the account.

    A ring all-reduce over n ranks makes each send 2 (n-1)/n of the tensor; that is what is counted.
    """

    def __init__(self, tensor_parallel: Transport) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._transport = tensor_parallel

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.c10d.allreduce_.default:
            tensors, size = args[0], self._transport.size
            sent = sum(t.nbytes for t in tensors) * 2 * (size - 1) // size
            alike = blank([(0, t) for t in tensors])

            def again() -> None:
                # The operation's own arguments are not to be kept: what they point to is gone after the call.
                for _, tensor in alike():
                    deepspeed.comm.all_reduce(tensor, group=getattr(self._transport, "group", None))

            self._transport.traffic.add("all_reduce", sent, again)
        return func(*args, **kwargs)
