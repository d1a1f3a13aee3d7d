"""Whether a checkpoint's tensors are those of the model that its config describes, before any is read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig, str_to_torch_dtype
from transformers.utils import logging

from ds_ring.errors import CheckpointError
from ds_ring.hf.build import build
from ds_ring.hf.checkpoint import Checkpoint
from ds_ring.hf.decoder import Decoder

NEXT_TOKEN_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "mtp_num_layers")
"""What configs call the number of layers for multi-token prediction. Checkpoints number them on after the model's own,
and transformers' models leave them out."""
NO_PARAMETER = re.compile(
    r"(inv_freq|masked_bias|position_ids|rope\.freqs|rotary_pos_emb|[kv]_scale|(attn|attention)\.bias)$"
)
"""Tensors that releases of transformers and of other tools have saved, and that a model computes itself or does
without: not parameters."""


def check_fit(checkpoint: Checkpoint, config: PretrainedConfig) -> None:
    """Load the checkpoint's names and shapes, by transformers' own loader with its renamings and conversions, into the
    model of ``config`` on the meta device.

    Raises:
        CheckpointError: a tensor is missing or of another shape; a layer beyond the config's, or a parameter of a layer
            that the model does not have, which transformers would drop with a warning at most; RoPE frequencies that
            are not finite.
    """
    with torch.device("meta"):
        model = build(config, torch.float32)
    _refuse_quantised(checkpoint)
    tensors = {
        name: torch.empty(part.get_shape(), dtype=str_to_torch_dtype[part.get_dtype()], device="meta")
        for name, part in checkpoint.lazy_tensors().items()
    }
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        info, _ = convert_and_load_state_dict_in_model(
            model,
            tensors,
            LoadStateDictConfig(
                device_map={"": "meta"}, dtype=torch.float32, weight_mapping=get_model_conversion_mapping(model),
                ignore_mismatched_sizes=True,
            ),
        )  # fmt: skip
    finally:
        if shown:
            logging.enable_progress_bar()
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    refuse_unfit(checkpoint.directory, info.missing_keys, info.mismatched_keys)
    _refuse_dropped(checkpoint.directory, model, info.unexpected_keys)
    _check_frequencies(checkpoint.directory, model)


def _refuse_quantised(checkpoint: Checkpoint) -> None:
    """Numbers of eight bits without scales would be taken for weights."""
    for name, part in checkpoint.lazy_tensors().items():
        if name.endswith(".weight") and part.get_dtype().startswith(("I8", "U8", "F8", "F4")):
            raise CheckpointError(
                f"{checkpoint.directory} has {name} in {part.get_dtype()}, though its config names no quantisation: "
                f"quantised weights are not supported; take the checkpoint in fp16, bf16 or fp32"
            )


def refuse_unfit(path: str | Path, missing: Iterable[str], mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    """Raise CheckpointError for tensors that are missing or of another shape.

    Args:
        mismatched: (name, shape on disk, shape needed).
    """
    if mismatched := sorted(mismatched):
        name, found, needed = mismatched[0]
        raise CheckpointError(f"{path} has {name} of shape {tuple(found)}, but its config needs {tuple(needed)}")
    if missing := sorted(missing):
        raise CheckpointError(f"{path} lacks {_some(missing)}")


def _refuse_dropped(path: Path, model: PreTrainedModel, unexpected: Iterable[str]) -> None:
    """Raise CheckpointError for tensors that the model's results would miss: of its list of layers, or of a module that
    has parameters. What transformers' model declares as left out is not among ``unexpected``; other parts of a
    checkpoint, such as a tower for images, are none of the model's modules."""
    text: Any = model.config.get_text_config()
    decoder = Decoder.of(model)
    count = len(decoder.layers)
    left_out = max((n for name in NEXT_TOKEN_LAYERS if type(n := getattr(text, name, 0)) is int), default=0)
    prefix = next(name for name, module in model.named_modules() if module is decoder.layers)
    layer = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    beyond, dropped = [], []
    for name in sorted(unexpected):
        if found := layer.match(name):
            number = int(found[1])
            if number >= count + left_out:
                beyond.append((number, name))
            elif number < count and not NO_PARAMETER.search(name):
                dropped.append(name)
        elif not NO_PARAMETER.search(name) and _has_parameters(model, name.rpartition(".")[0]):
            dropped.append(name)
    if beyond:
        number, name = max(beyond)
        raise CheckpointError(
            f"{path} has layers up to number {number} ({name}), but its config.json says num_hidden_layers={count}: "
            f"layers would be left out; put the number right"
        )
    if dropped:
        raise CheckpointError(
            f"{path} has {_some(dropped)}, which {type(model).__name__} with this config.json does not use: the two "
            f"are not of one model"
        )


def _has_parameters(model: PreTrainedModel, name: str) -> bool:
    modules = dict(model.named_modules())
    return name in modules and any(True for _ in modules[name].parameters(recurse=False))


def _check_frequencies(path: Path, model: PreTrainedModel) -> None:
    for module in model.modules():
        for name, buffer in _frequencies(module).items():
            if not buffer.isfinite().all():
                raise CheckpointError(f"{path}/config.json: its RoPE parameters give a {name} that is not finite")


def _frequencies(module: nn.Module) -> dict[str, Tensor]:
    """Those of a rotary embedding on the meta device, computed. Of classes that take more than a config they are left
    out."""
    if not any("inv_freq" in name for name, _ in module.named_buffers(recurse=False)):
        return {}
    try:
        made: Any = type(module)(module.config)
    except (AttributeError, TypeError):
        return {}
    return {name: buffer for name, buffer in made.named_buffers() if "inv_freq" in name}


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
