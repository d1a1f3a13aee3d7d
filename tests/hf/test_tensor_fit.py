"""A checkpoint's tensors are those of the model that its config describes, or it is refused before one is read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Glm4MoeConfig, PretrainedConfig

import ds_ring
from ds_ring import api
from ds_ring.errors import CheckpointError
from ds_ring.hf.checkpoint import Checkpoint
from ds_ring.hf.tensor_fit import check_fit
from ds_ring.utils.model_config import read_config
from ds_ring.utils.weight_files import SINGLE
from tests.helpers.tiny_models import ARCHITECTURES, build, gpt_neox, llama_gqa

LAYER = "model.layers.{}.self_attn.q_proj.weight"


def saved(
    config: PretrainedConfig, folder: Path, tensors: dict[str, torch.Tensor] | None = None, **fields: Any
) -> Path:
    """A checkpoint of ``config`` with more tensors, and fields of config.json that are changed afterwards."""
    build(config).save_pretrained(folder)
    if tensors:
        more = {name: tensor.clone() for name, tensor in tensors.items()}
        save_file(load_file(folder / SINGLE) | more, folder / SINGLE, metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


def fit(folder: Path) -> None:
    check_fit(Checkpoint.open(folder), read_config(folder))


def refused(text: str):
    return pytest.raises(CheckpointError, match=re.escape(text))


def mtp(layers: int = 1) -> PretrainedConfig:
    return Glm4MoeConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=32, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, num_nextn_predict_layers=layers,
    )  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_transformers_saved_fits(name, tmp_path):
    fit(saved(ARCHITECTURES[name](), tmp_path))


WEIGHT = torch.zeros(4, 4)


@pytest.mark.parametrize(
    ("config", "more"),
    [
        (mtp, {LAYER.format(3): WEIGHT, "model.layers.3.eh_proj.weight": WEIGHT}),
        (llama_gqa, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        (llama_gqa, {"model.layers.0.self_attn.k_scale": torch.ones(())}),
        (lambda: gpt_neox(4, 2), {
            "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
            "gpt_neox.layers.0.attention.masked_bias": torch.ones(()),
            "gpt_neox.layers.1.attention.rotary_emb.inv_freq": torch.ones(4),
        }),
        (llama_gqa, {"vision_tower.encoder.layers.7.weight": WEIGHT, "model.visual.blocks.9.weight": WEIGHT}),
        (llama_gqa, {"mtp.layers.0.self_attn.q_proj.weight": WEIGHT}),
    ],
    ids=["layers of multi-token prediction", "frequencies", "scales", "masks", "tower", "mtp"],
)  # fmt: skip
def test_what_a_model_leaves_out_by_design_is_no_error(config, more, tmp_path):
    fit(saved(config(), tmp_path, more))


DROPPED: dict[str, tuple[Callable[[], PretrainedConfig], dict[str, torch.Tensor], dict[str, Any], str]] = {
    "fewer layers": (
        llama_gqa, {}, {"num_hidden_layers": 2},
        "has layers up to number 2 (model.layers.2.self_attn.v_proj.weight), but its config.json says "
        "num_hidden_layers=2: layers would be left out",
    ),
    "more layers than of multi-token prediction": (
        mtp, {LAYER.format(3): WEIGHT, LAYER.format(4): WEIGHT}, {}, f"has layers up to number 4 ({LAYER.format(4)})",
    ),
    "biases": (
        lambda: llama_gqa(attention_bias=True), {}, {"attention_bias": False},
        "has model.layers.0.self_attn.k_proj.bias, model.layers.0.self_attn.o_proj.bias, "
        "model.layers.0.self_attn.q_proj.bias and 9 more, which LlamaForCausalLM with this config.json does not use",
    ),
    "a bias of the head": (llama_gqa, {"lm_head.bias": torch.zeros(97)}, {}, "has lm_head.bias, which"),
    "a norm": (llama_gqa, {"model.layers.1.q_norm.weight": torch.ones(8)}, {}, "has model.layers.1.q_norm.weight"),
    "more layers": (llama_gqa, {}, {"num_hidden_layers": 4}, "lacks model.layers.3.input_layernorm.weight, "),
    "wider": (
        llama_gqa, {}, {"intermediate_size": 128},
        "has model.layers.0.mlp.down_proj.weight of shape (72, 96), but its config needs (72, 128)",
    ),
    "frequencies": (
        llama_gqa, {}, {"rope_parameters": {"rope_type": "default", "rope_theta": -0.5}},
        "config.json: its RoPE parameters give a inv_freq that is not finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("config", "more", "fields", "words"), DROPPED.values(), ids=DROPPED.keys())
def test_what_would_be_dropped_or_made_up(config, more, fields, words, tmp_path):
    with refused(words):
        fit(saved(config(), tmp_path, more, **fields))


@pytest.mark.parametrize("layout", [{"ring_degree": 2}, {"pp_size": 2}], ids=str)
def test_it_is_refused_in_every_layout_before_ranks_connect_and_weights_load(layout, tmp_path, monkeypatch):
    saved(llama_gqa(), tmp_path, num_hidden_layers=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("connect", "load_stage", "load_model"):
        monkeypatch.delattr(api, name)
    with refused(f"{tmp_path} has layers up to number 2"):
        ds_ring.from_pretrained(tmp_path, {"dtype": "fp32"}, **layout)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_numbers_of_eight_bits_are_no_weights(dtype, tmp_path):
    build(llama_gqa()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="though its config names no quantisation"):
        check_fit(Checkpoint.open(tmp_path), read_config(tmp_path))
