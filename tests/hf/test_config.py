"""A config says what a model is. How it is run, by which code and packages, is never the checkpoint's to say."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.integrations import hub_kernels
from transformers.utils import hub

from ds_ring.cli.seeded_checkpoint import byte_tokenizer
from ds_ring.config import RunConfig
from ds_ring.engine.dry_run import dry_run
from ds_ring.errors import CheckpointError, UserError
from ds_ring.hf.build import build
from ds_ring.hf.checkpoint import Checkpoint
from ds_ring.hf.dims import model_dims
from ds_ring.hf.loading import load_model, load_stage, weight_bytes
from ds_ring.hf.tensor_fit import check_fit
from ds_ring.utils import model_config
from ds_ring.utils.corpus import load_tokenizer
from ds_ring.utils.model_config import read_config
from tests.helpers import tiny_models
from tests.helpers.tiny_models import ARCHITECTURES, gemma3, llama_gqa, logits, tokens

CPU = torch.device("cpu")
CODE = "evil-owner/kernels"


def edit(folder: Path, **fields: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    tiny_models.build(llama_gqa()).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def nothing_is_fetched(monkeypatch):
    """Whatever asks for a kernel, a file of the hub or a connection fails the test."""

    def asked(*args: Any, **_: Any) -> None:
        pytest.fail(f"asked for {args[:2]}")

    monkeypatch.setattr(hub_kernels, "get_kernel", asked)
    monkeypatch.setattr(hub, "hf_hub_download", asked)
    monkeypatch.setattr(socket.socket, "connect", asked)


RUN_BY: dict[str, dict[str, Any]] = {
    "a package": {"attn_implementation": "flash_attention_2"},
    "code": {"_attn_implementation": CODE},
    "code, paged": {"attn_implementation": f"paged|{CODE}"},
    "code for a part": {"attn_implementation": {"": CODE, "text_config": CODE}},
    "code behind the property": {"_attn_implementation_internal": CODE},
    "experts": {"experts_implementation": "sonicmoe", "_experts_implementation": "deepgemm"},
    "a patch of the class": {"fusion_config": {"patch_embeddings": True}},
    "kernels": {"use_kernels": True, "kernel_config": {"kernel_mapping": {"RMSNorm": CODE}}},
    "a plan": {"base_model_tp_plan": {"layers.*.self_attn.q_proj": "colwise"}},
    "results": {
        "output_attentions": True,
        "output_hidden_states": True,
        "return_dict": False,
        "use_return_dict": False,
    },
}


@pytest.mark.usefixtures("nothing_is_fetched")
@pytest.mark.parametrize("fields", RUN_BY.values(), ids=RUN_BY.keys())
def test_how_a_model_is_run_is_not_read_from_its_config(fields, checkpoint):
    plain, ids = read_config(checkpoint), tokens(1, 9)
    want = logits(load_model(checkpoint, torch.float32, CPU), ids)
    config = read_config(edit(checkpoint, **fields))
    assert config.to_dict() == plain.to_dict()
    assert (config._attn_implementation, config._experts_implementation) == (None, None)
    dry_run(config, RunConfig.load({"dtype": "fp32"}))
    check_fit(Checkpoint.open(checkpoint), config)
    assert weight_bytes(config, torch.float32, range(1)) > 0
    load_tokenizer(checkpoint)
    load_stage(checkpoint, torch.float32, CPU, range(1))
    assert torch.equal(logits(load_model(checkpoint, torch.float32, CPU), ids), want)


@pytest.mark.usefixtures("nothing_is_fetched")
def test_nor_from_a_part_of_it(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": {"attn_implementation": CODE, "dtype": "auto"}})
    )
    config = read_config(tmp_path)
    assert config.get_text_config()._attn_implementation is None
    with torch.device("meta"):
        assert build(config).config.get_text_config()._attn_implementation in ("sdpa", "eager")


@pytest.mark.usefixtures("nothing_is_fetched")
def test_a_model_is_made_with_none_of_it_even_where_the_config_object_says_so():
    with torch.device("meta"):
        assert build(llama_gqa(attn_implementation="flash_attention_2")).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_otherwise_it_is_the_config_that_transformers_reads(name, tmp_path):
    ARCHITECTURES[name]().save_pretrained(tmp_path)
    mine, theirs = read_config(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert type(mine) is type(theirs)
    assert mine.to_dict() == theirs.to_dict()
    assert mine.name_or_path == theirs.name_or_path == str(tmp_path)


def test_mistral_s_with_kinds_of_layers_are_ministral_s(tmp_path):
    kinds = ["full_attention", "sliding_attention"]
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mistral", "num_hidden_layers": 2, "layer_types": kinds})
    )
    assert type(read_config(tmp_path)) is type(AutoConfig.from_pretrained(tmp_path)) is CONFIG_MAPPING["ministral"]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "type": ({"num_hidden_layers": "3"}, "field 'num_hidden_layers': TypeError: Field 'num_hidden_layers' expected"),
    "type, not named": ({"id2label": 5}, "id2label"),
    "a method": ({"get_text_config": 5}, "the field 'get_text_config' is a part of LlamaConfig that no file sets"),
    "names": ({"attribute_map": {"vocab_size": "x"}}, "the field 'attribute_map' is a part of LlamaConfig"),
    "a property": ({"sub_configs": {}}, "the field 'sub_configs' is a part of LlamaConfig that no file sets"),
    "model_type": ({"model_type": ["llama"]}, "model_type=['llama'] is none that transformers 5."),
    "model_type NaN": ({"model_type": float("nan")}, "config.json: model_type=nan is not a number that fp32 has"),
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is beyond any model; at most 10000"),
    "NaN": ({"rms_norm_eps": float("nan")}, "config.json: rms_norm_eps=nan is not a number that fp32 has"),
    "NaN, as transformers writes it": ({"x": {"__float__": "NaN"}}, "config.json: x=nan is not a number"),
    "negative": ({"rms_norm_eps": -1e-6}, "rms_norm_eps=-1e-06 must be a number of at least 0"),
    "another file": ({"configuration_files": ["config.4.0.0.json"]}, "config.json refers to other files"),
    "quantised in a part": ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "(fp8): quantised"),
    "positions": ({"max_position_embeddings": 0}, "max_position_embeddings=0 must be a whole number of at least 1"),
    "a part": ({"text_config": 5}, "the language model's part is 5 instead of an object"),
    "a window of no length": (
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "config.json: layer_types has sliding_attention, but sliding_window=None says not how many tokens",
    ),
    "an encoder": ({"is_encoder_decoder": True}, "is of an encoder and a decoder (is_encoder_decoder)"),
    "building": ({"hidden_act": "x"}, "makes no causal LM of this LlamaConfig: hidden_act='x': KeyError: 'x'"),
}  # fmt: skip


def made(folder: Path) -> None:
    config = read_config(folder)
    model_dims(config)
    with torch.device("meta"):
        build(config)


@pytest.mark.parametrize(("fields", "words"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_field_is_named_with_the_reason_in_one_line(fields, words, checkpoint):
    edit(checkpoint, **fields)
    with pytest.raises(UserError) as found:
        made(checkpoint)
    assert words in str(found.value)
    assert str(checkpoint) in str(found.value)
    assert "\n" not in str(found.value)


def test_an_infinity_that_transformers_itself_writes_is_read(tmp_path):
    CONFIG_MAPPING["mamba2"]().save_pretrained(tmp_path)
    assert read_config(tmp_path).time_step_limit[1] == float("inf")


def test_a_field_is_not_looked_for_longer_than_allowed(monkeypatch):
    monkeypatch.setattr(model_config, "BLAME_S", 0.0)
    assert model_config.blame("odd", {"a": 1}, lambda fields: None) == ""
    monkeypatch.setattr(model_config, "BLAME_S", 9.0)
    assert model_config.blame("odd", {"a": 1}, lambda fields: None) == "a=1: "
    assert model_config.blame("odd", {"a": 1, "b": 2}, lambda fields: None) == ""
    assert model_config.blame("the field a", {"a": 1}, lambda fields: None) == ""


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.json cannot be read: no such config file"):
        read_config(tmp_path / "none.json")
    with pytest.raises(CheckpointError, match=rf"^{tmp_path} has no config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("window", [None, 0])
def test_layers_with_a_window_of_no_length_are_refused_where_transformers_raises(window):
    config = gemma3(sliding_window=window)
    with pytest.raises(CheckpointError, match=f"sliding_window={window} says not how many tokens such a layer sees"):
        model_dims(config)
    if window is None:
        with pytest.raises(ValueError, match="sliding_window"), torch.no_grad():
            tiny_models.build(config)(torch.ones(1, 4).long(), use_cache=False)
    kinds = ["full_attention"] * config.num_hidden_layers
    assert model_dims(gemma3(sliding_window=window, layer_types=kinds)).windows == (None,) * len(kinds)
