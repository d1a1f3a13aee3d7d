"""A checkpoint's config as transformers' object, without the settings that are ours to make."""

from __future__ import annotations

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
    "use_kernels", "kernel_config", "distributed_config", "device_map", "tp_plan",
    # Which file holds the weights: ``utils.weight_files`` has read it.
    "transformers_weights",
    # What a forward returns. An engine asks for what it needs, by name.
    "output_attentions", "output_hidden_states", "return_dict", "use_return_dict", "torchscript",
}  # fmt: skip
"""Fields of config.json that say how a model is run, not what it is, at any depth: left out when it is read, so that
the checkpoint chooses neither code nor packages. What was looked at is transformers 5.17 to 5.23: every use of
``hub_kernels``, ``use_kernels``, ``*_implementation`` and ``getattr(config, …)`` in modeling_utils.py,
configuration_utils.py and integrations/. Models whose own code looks for kernels (Mamba's) are not served."""


def read_config(path: str | Path) -> PretrainedConfig:
    """The transformers config of a checkpoint directory or of a config file; runs no code of the checkpoint.

    Raises:
        CheckpointError: transformers cannot read the config; the error has the file and transformers' own message.
    """
    file = Path(path) / CONFIG if Path(path).is_dir() else Path(path)
    fields = _what_it_is(read_fields(path))
    try:
        _refuse_methods(fields)
        config: PretrainedConfig = _class_of(fields).from_dict(fields)
    except Exception as error:  # fields of a wrong type or size end in errors of any kind
        raise CheckpointError(f"{file} holds no config that transformers can read: {in_one_line(error)}") from None
    config.name_or_path = str(path)
    return config


def file_of(config: PretrainedConfig) -> str:
    """What errors call a config: its file where it was read from one."""
    path = Path(config.name_or_path or CONFIG)
    return str(path / CONFIG if path.is_dir() else path)


def _class_of(fields: dict[str, Any]) -> Any:
    """The class that ``AutoConfig.from_pretrained`` takes; it reads nothing but files."""
    kind = fields.get("model_type")
    if kind == "mistral" and "layer_types" in fields:
        kind = "ministral"
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"model_type={kind!r} is none that transformers {transformers.__version__} has")
    return CONFIG_MAPPING[kind]


def _what_it_is(value: Any) -> Any:
    """``value`` of config.json without the fields of ``OURS``, nor a dtype that says nothing."""
    if isinstance(value, list):
        return [_what_it_is(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        name: _what_it_is(each)
        for name, each in value.items()
        if name not in OURS and not (name in ("dtype", "torch_dtype") and each == AUTO)
    }


def _refuse_methods(fields: dict[str, Any]) -> None:
    """transformers makes an attribute of every field, also where that hides one of its own methods."""
    for name in fields:
        if name.startswith("__") or callable(getattr(PretrainedConfig, name, None)):
            raise ValueError(f"the field {name!r} is a method of transformers' configs")
