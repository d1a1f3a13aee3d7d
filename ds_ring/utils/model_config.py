"""A checkpoint's config as transformers' object, without the settings that are ours to make."""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig

from ds_ring.errors import CheckpointError, in_one_line
from ds_ring.utils.checkpoint_dtype import AUTO
from ds_ring.utils.config_file import CONFIG, read_fields

OURS = {
    # transformers sets these from any config.json (PreTrainedConfig.__post_init__). "flash_attention_2" asks for a
    # package, and a name with a slash, "paged|…" too, fetches code from the hub and runs it, when a model is made
    # (PreTrainedModel.__init__ → _check_and_adjust_attn_implementation). Sub-configs have their own.
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset",
    # The same for mixtures of experts; "sonicmoe" and "deepgemm" fetch kernels at the first forward.
    "experts_implementation", "_experts_implementation", "_experts_implementation_internal",
    # from_pretrained patches the model's class by it, from_config does not (fusion_mapping.register_fusion_patches).
    "fusion_config",
    # Arguments of from_pretrained, which config.json may not give today; taken out so that no release reads them.
    "use_kernels", "kernel_config", "distributed_config", "device_map", "tp_plan", "base_model_tp_plan",
    "base_model_pp_plan", "base_model_ep_plan", "base_model_fsdp_plan",
    # Which file holds the weights: ``utils.weight_files`` has read it.
    "transformers_weights",
    # What a forward returns. An engine asks for what it needs, by name.
    "output_attentions", "output_hidden_states", "return_dict", "use_return_dict", "torchscript",
}  # fmt: skip
"""Fields of config.json that say how a model is run, not what it is, at any depth: left out when it is read, so that
the checkpoint chooses neither code nor packages. Looked for in transformers 5.23: ``hub_kernels``, ``get_kernel``,
``lazy_load_kernel``, ``use_kernels``, ``*_implementation``, ``fusion_config``. Its only other kernels of the hub are
those of quantised weights and of models that are not served (RWKV, MRA, YOSO), which are refused, and of
``use_kernels=True``, which is an argument and never given."""

DTYPE = ("dtype", "torch_dtype")
BLAME_S = 3.0
"""How long is looked for the field that is to blame where an error does not name it."""


def read_config(path: str | Path) -> PretrainedConfig:
    """The transformers config of a checkpoint directory or of a config file; runs no code of the checkpoint.

    Raises:
        CheckpointError: transformers cannot read the config; the error has the file and transformers' own message.
    """
    file = Path(path) / CONFIG if Path(path).is_dir() else Path(path)
    fields = _what_it_is(read_fields(path))
    try:
        config = _config_of(fields)
    except Exception as error:  # fields of a wrong type or size end in errors of any kind
        reason = in_one_line(error)
        blamed = blame(reason, fields, _config_of)
        raise CheckpointError(f"{file} holds no config that transformers can read: {blamed}{reason}") from None
    config.name_or_path = str(path)
    return config


def file_of(config: PretrainedConfig) -> str:
    """What errors call a config: its file where it was read from one."""
    path = Path(config.name_or_path or CONFIG)
    return str(path / CONFIG if path.is_dir() else path)


def blame(reason: str, fields: dict[str, Any], attempt: Callable[[dict[str, Any]], object]) -> str:
    """``NAME=VALUE: `` of the field without which ``attempt`` goes well, or nothing: where ``reason`` names it, where
    it is not one alone, or where it is not found in ``BLAME_S``."""
    names, ends = [name for name in fields if name != "model_type"], time.monotonic() + BLAME_S
    if any(name in reason for name in names):
        return ""
    found = [name for name in names if time.monotonic() < ends and _goes_well(attempt, fields, name)]
    return f"{found[0]}={fields[found[0]]!r}: " if len(found) == 1 else ""


def _goes_well(attempt: Callable[[dict[str, Any]], object], fields: dict[str, Any], without: str) -> bool:
    try:
        attempt({name: value for name, value in fields.items() if name != without})
    except Exception:
        return False
    return True


def _config_of(fields: dict[str, Any]) -> PretrainedConfig:
    kind = _class_of(fields)
    _refuse_hidden(kind, fields)
    config: PretrainedConfig = kind.from_dict(dict(fields))
    return config


def _class_of(fields: dict[str, Any]) -> Any:
    """The class that ``AutoConfig.from_pretrained`` takes; it reads nothing but files."""
    kind = fields.get("model_type")
    if kind == "mistral" and "layer_types" in fields:
        kind = "ministral"
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(f"model_type={kind!r} is none that transformers {transformers.__version__} has")
    return CONFIG_MAPPING[kind]


def _what_it_is(value: Any) -> Any:
    """``value`` of config.json without the fields of ``OURS``, nor a dtype that says nothing. Some write one with its
    module, "torch.bfloat16", which transformers does not read."""
    if isinstance(value, list):
        return [_what_it_is(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        name: each.removeprefix("torch.") if name in DTYPE and isinstance(each, str) else _what_it_is(each)
        for name, each in value.items()
        if name not in OURS and not (name in DTYPE and each == AUTO)
    }


def _refuse_hidden(kind: type, fields: dict[str, Any]) -> None:
    """transformers makes an attribute of every field, also where that hides a part of its class, or cannot."""
    settable = {"model_type", *(field.name for field in dataclasses.fields(kind))}
    for name in fields:
        own = inspect.getattr_static(kind, name, None)
        fixed = own.fset is None if isinstance(own, property) else callable(own) or hasattr(PretrainedConfig, name)
        if name.startswith("__") or (fixed and name not in settable):
            raise ValueError(f"the field {name!r} is a part of {kind.__name__} that no file sets")
