"""Weights from safetensors into a whole model, or into the layers of one pipeline stage."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from ds_ring.errors import is_out_of_memory
from ds_ring.hf.build import ATTENTION, build
from ds_ring.hf.checkpoint import Checkpoint
from ds_ring.hf.decoder import Decoder
from ds_ring.hf.generation_settings import read_generation_config
from ds_ring.hf.stage import keep_stage, strip
from ds_ring.hf.tensor_fit import refuse_unfit
from ds_ring.utils.model_config import read_config


def load_model(path: str | Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The whole model on ``device``; shards are memory-mapped, so ranks of a host share one copy in host memory.

    Config and tensors are handed to transformers, which would choose files by rules of its own.
    """
    checkpoint = Checkpoint.open(path)
    with torch.device("meta"):
        empty = build(read_config(path), dtype)
    model, info = type(empty).from_pretrained(
        None,
        config=empty.config,
        state_dict=checkpoint.lazy_tensors(),
        dtype=dtype,
        device_map={"": device},
        attn_implementation=ATTENTION,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below, by name
    )
    refuse_unfit(path, info["missing_keys"], info["mismatched_keys"])
    assert isinstance(model, PreTrainedModel)
    model.name_or_path = model.config.name_or_path = str(path)
    model.generation_config = read_generation_config(checkpoint.directory)
    return model.eval()


def load_stage(path: str | Path, dtype: torch.dtype, device: torch.device, layers: range) -> PreTrainedModel:
    """The model with only ``layers``, and the embedding and the head where they belong to the stage; reads no other
    tensor.

    The model is built on the meta device and cut down to the stage. Then transformers' own loader, with its renamings
    and conversions of old checkpoints, fills what remains.
    """
    checkpoint = Checkpoint.open(path)
    decoder, tied = without_weights(read_config(path), dtype, layers)
    model = decoder.model
    mismatched = convert(model, checkpoint.lazy_tensors(), dtype, device)
    if tied:
        model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    refuse_unfit(path, missing, mismatched)
    model.generation_config = read_generation_config(checkpoint.directory)
    keep_stage(decoder, layers)
    return model.to(device).eval()


def convert(model: PreTrainedModel, tensors: dict[str, Any], dtype: torch.dtype, device: torch.device) -> list[Any]:
    """Fill the parameters of ``model`` that ``tensors`` are for, as transformers does, with its renamings and
    conversions; returns what it says of tensors of other shapes."""
    info, _ = convert_and_load_state_dict_in_model(
        model,
        tensors,
        LoadStateDictConfig(device_map={"": device}, dtype=dtype, weight_mapping=get_model_conversion_mapping(model)),
    )
    _raise_out_of_memory(info.conversion_errors.values())
    return list(info.mismatched_keys)


def weight_bytes(config: PretrainedConfig, dtype: torch.dtype, layers: range) -> int:
    """Bytes of the parameters that a rank loads, those of all layers or of a stage's."""
    decoder, _ = without_weights(config, dtype, layers)
    return sum(parameter.nbytes for parameter in decoder.model.parameters())


def without_weights(config: PretrainedConfig, dtype: torch.dtype, layers: range) -> tuple[Decoder, bool]:
    """The model with parameters on the meta device, stripped to the stage of ``layers``; whether its head is tied to an
    embedding here."""
    with init_empty_weights(include_buffers=False):
        model = build(config, dtype)
    decoder = Decoder.of(model)
    last = layers.stop == len(decoder.layers)
    # Whether the head is tied is not read from a config: a model of several parts has several. Tied weights were
    # separated on their way to the meta device.
    model.tie_weights()
    head = model.get_output_embeddings()
    tied = last and head is not None and head.weight is model.get_input_embeddings().weight
    # A tied head is loaded as the embedding, which then has to stay.
    strip(decoder, layers, keep_embedding=tied)
    return decoder, tied


def _raise_out_of_memory(conversion_errors: Iterable[str]) -> None:
    """Raise an out-of-memory error that transformers only noted while it converted tensors.

    A tensor that was not converted for want of memory is not missing in the checkpoint. A note is a traceback, then the
    error, and on its last line what was converted.
    """
    for note in conversion_errors:
        error = RuntimeError(*note.splitlines()[-2:-1])
        if is_out_of_memory(error):
            raise error
