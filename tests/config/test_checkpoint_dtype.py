"""The dtype that nobody gives is the one that transformers' ``dtype="auto"`` takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, PretrainedConfig

from benchmarks.models.tiny_models import tiny_config
from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError
from ds_ring.hf.attention import torch_dtype
from ds_ring.utils.model_config import read_config
from tests.helpers.tiny_models import build, gemma3, llama_gqa


def wrapper() -> PretrainedConfig:
    """Language model and vision tower: a config in parts."""
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 8,
    }  # fmt: skip
    return Gemma3Config(text_config=gemma3().to_dict(), vision_config=vision, mm_tokens_per_image=1)


def text_only() -> PretrainedConfig:
    """A config in parts of which the causal LM takes the language model's only."""
    return tiny_config("qwen3_5")


def saved(config: PretrainedConfig, folder: Path, dtype: torch.dtype, **options: Any) -> Path:
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder, **options)
    return folder


def edit(folder: Path, **fields: Any) -> None:
    """Change fields of config.json; None takes one out. ``text_config``: fields of that part."""
    file = folder / "config.json"
    found = json.loads(file.read_text())
    parts = fields.pop("text_config", {})
    for where, changes in ((found, fields), (found.get("text_config", {}), parts)):
        where.update(changes)
        for name in [name for name, value in where.items() if value is None and name in changes]:
            del where[name]
    file.write_text(json.dumps(found))


def ours(folder: Path, source: dict[str, Any] | None = None, **options: Any) -> torch.dtype:
    return torch_dtype(RunConfig.load(source or {}, model=str(folder), **options).dtype)


def of_transformers(folder: Path) -> torch.dtype:
    found: torch.dtype = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype
    return found


FORMS: dict[str, tuple[Any, torch.dtype, dict[str, Any]]] = {
    "as saved": (llama_gqa, torch.bfloat16, {}),
    "none": (llama_gqa, torch.bfloat16, {"dtype": None}),
    "none, fp32": (llama_gqa, torch.float32, {"dtype": None}),
    "the old name": (llama_gqa, torch.float16, {"dtype": None, "torch_dtype": "bfloat16"}),
    "other than the weights": (llama_gqa, torch.bfloat16, {"dtype": "float32"}),
    "in parts, as saved": (wrapper, torch.bfloat16, {}),
    "in parts, none at the top": (wrapper, torch.bfloat16, {"dtype": None, "text_config": {"dtype": "bfloat16"}}),
    "in parts, none": (wrapper, torch.bfloat16, {"dtype": None, "text_config": {"dtype": None}}),
    "text only, none at the top": (text_only, torch.bfloat16, {"dtype": None, "text_config": {"dtype": "float16"}}),
    "text only, none": (text_only, torch.bfloat16, {"dtype": None, "text_config": {"dtype": None}}),
}


@pytest.mark.parametrize(("config", "dtype", "fields"), FORMS.values(), ids=FORMS.keys())
def test_every_form_is_read_as_transformers_reads_it(config, dtype, fields, tmp_path):
    edit(saved(config(), tmp_path, dtype), **fields)
    assert ours(tmp_path) == of_transformers(tmp_path)
    assert ours(tmp_path, {"dtype": "auto"}) == ours(tmp_path, dtype="auto") == ours(tmp_path)
    assert ours(tmp_path, {"dtype": "fp32"}, dtype="auto") == ours(tmp_path)
    assert ours(tmp_path, {"dtype": "auto"}, dtype="fp16") == torch.float16


@pytest.mark.parametrize("word", ["auto", "torch.bfloat16"])
def test_words_that_transformers_itself_cannot_read_in_config_json(word, tmp_path):
    saved(llama_gqa(), tmp_path, torch.bfloat16)
    edit(tmp_path, dtype=word)
    assert ours(tmp_path) == torch.bfloat16
    assert read_config(tmp_path).dtype == (None if word == "auto" else torch.bfloat16)


def test_auto_in_config_json_is_read_past(tmp_path):
    edit(saved(wrapper(), tmp_path, torch.float16), dtype="auto", text_config={"dtype": "auto"})
    assert ours(tmp_path) == torch.float16
    config = read_config(tmp_path)
    assert (config.dtype, config.text_config.dtype) == (None, None)


@pytest.mark.parametrize(("fp32", "dtype"), [("norm", torch.bfloat16), ("lm_head", torch.float32)])
def test_of_weights_of_several_dtypes_the_first_floating_one_counts(fp32, dtype, tmp_path):
    edit(saved(llama_gqa(), tmp_path, torch.bfloat16), dtype=None)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    wide = {name: tensor.float() for name, tensor in tensors.items() if fp32 in name}
    save_file({**tensors, **wide, "a": torch.zeros(9, dtype=torch.int64)}, file, metadata={"format": "pt"})
    assert ours(tmp_path) == of_transformers(tmp_path) == dtype


@pytest.mark.parametrize("said", [None, "float16"])
def test_weights_in_shards(said, tmp_path):
    edit(saved(llama_gqa(), tmp_path, torch.bfloat16, max_shard_size="50KB"), dtype=None)
    if said:
        file = tmp_path / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        index["metadata"]["dtype"] = said
        file.write_text(json.dumps(index))
    assert ours(tmp_path) == of_transformers(tmp_path) == (torch.float16 if said else torch.bfloat16)


def test_one_that_no_run_can_have_is_refused_with_its_place(tmp_path):
    build(llama_gqa()).save_pretrained(tmp_path)
    edit(tmp_path, dtype="float64")
    with pytest.raises(ConfigError, match=f'^dtype="float64", which the checkpoint {tmp_path} says, is not supported'):
        ours(tmp_path)
    assert ours(tmp_path, dtype="bf16") == torch.bfloat16


def test_of_a_folder_that_cannot_be_read_nothing_is_said(tmp_path):
    """What is wrong with it is said where it is opened."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    assert ours(tmp_path) == torch.float32
