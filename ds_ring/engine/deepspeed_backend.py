"""DeepSpeed as the engines use it: ``init_inference``, and what it must not be asked for."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Any

import deepspeed
from deepspeed.module_inject.fusedqkv_utils import get_fused_qkv_type
from deepspeed.module_inject.layers import (
    Yuan_LinearAllreduce,
    Yuan_LinearLayer,
    fused_LinearLayer,
)
from torch import nn
from transformers import PreTrainedModel

from ds_ring.config import RunConfig
from ds_ring.config.weights import without_weights
from ds_ring.errors import ConfigError, UnsupportedModelError
from ds_ring.hf.attention import float_buffers_kept, torch_dtype
from ds_ring.transport.base import Transport

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
    keys = {**without_weights(config.deepspeed), "dtype": torch_dtype(config.dtype)}
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
