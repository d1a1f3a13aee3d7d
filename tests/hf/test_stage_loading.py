"""Weights from safetensors: a stage reads its own tensors and no other, and what is missing is named."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import MergeModulelist

import ds_ring
from benchmarks.models.tiny_models import tiny_config, tiny_model
from ds_ring import api
from ds_ring.errors import CheckpointError
from ds_ring.hf.checkpoint import Checkpoint
from ds_ring.hf.decoder import Decoder
from ds_ring.hf.loading import load_model, load_stage, weight_bytes
from ds_ring.parallel.degrees import stage_layers
from ds_ring.utils.weight_files import INDEX, SINGLE
from tests.helpers.mocked_launch import mocked_launch
from tests.helpers.mocked_world import relative_error
from tests.helpers.tiny_models import ARCHITECTURES, build, gpt_neox, llama_gqa, logits, tokens

CPU = torch.device("cpu")
EMBEDDINGS = {"embed_tokens", "embed_in", "embed_positions", "wte", "wpe"}
LAST_NORMS = {"norm", "final_layer_norm", "ln_f"}


class _SpiedSlice:
    """A safetensors slice that records when its bytes are read."""

    def __init__(self, inner: Any, tell: Callable[[], None]) -> None:
        self._inner, self._tell = inner, tell

    def __getitem__(self, index: Any) -> Tensor:
        self._tell()
        return self._inner[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.fixture
def read(monkeypatch) -> set[str]:
    """Names of the tensors whose bytes were read from a checkpoint."""
    names: set[str] = set()
    lazy_tensors = Checkpoint.lazy_tensors

    def spied(self: Checkpoint) -> dict[str, Any]:
        return {
            name: _SpiedSlice(inner, lambda name=name: names.add(name)) for name, inner in lazy_tensors(self).items()
        }

    monkeypatch.setattr(Checkpoint, "lazy_tensors", spied)
    return names


def saved(config: PretrainedConfig, directory: Path, **options: Any) -> PreTrainedModel:
    model = build(config)
    model.save_pretrained(directory, **options)
    return model


def layer_of(name: str) -> int | None:
    """The layer that a tensor's name belongs to: the one number in it."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def edit(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite the only weights file of a checkpoint."""
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_stage_reads_its_own_tensors_and_no_other(name, stage, tmp_path, read):
    model = saved(ARCHITECTURES[name](), tmp_path)
    count = model.config.num_hidden_layers
    layers, last = stage_layers(count, 2, stage), stage == 1
    load_stage(tmp_path, torch.float32, CPU, layers)
    assert {layer_of(n) for n in read} - {None} == set(layers)
    ends = {part for n in read if layer_of(n) is None for part in n.split(".")}
    tied = model.config.tie_word_embeddings
    assert bool(ends & EMBEDDINGS) == (stage == 0 or tied)
    assert bool(ends & LAST_NORMS) == last
    assert bool(ends & {"lm_head", "embed_out"}) == (last and not tied)


@pytest.mark.parametrize("name", ["gpt_neox", "gemma", "mixtral"])
def test_what_a_stage_s_weights_take_is_known_before_they_load(name, tmp_path):
    model = saved(ARCHITECTURES[name](), tmp_path)
    count = model.config.num_hidden_layers
    for layers in (range(count), stage_layers(count, 2, 0), stage_layers(count, 2, 1)):
        part = load_stage(tmp_path, torch.float16, CPU, layers)
        assert weight_bytes(model.config, torch.float16, layers) == sum(p.nbytes for p in part.parameters())
    assert weight_bytes(model.config, torch.float32, range(count)) == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize(
    ("failure", "error"),
    [(torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), RuntimeError), (ValueError("odd"), CheckpointError)],
    ids=["memory", "other"],
)
def test_memory_that_runs_out_in_a_conversion_is_not_the_checkpoint_s_fault(failure, error, tmp_path, monkeypatch):
    saved(ARCHITECTURES["mixtral"](), tmp_path)

    def fails(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(MergeModulelist, "convert", fails)
    words = r"^CUDA out of memory\. Tried 2 GiB$" if error is RuntimeError else "lacks .*experts"
    with pytest.raises(error, match=words):
        load_stage(tmp_path, torch.float32, CPU, range(2))


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5])
def test_stages_together_are_the_model(stages, tmp_path):
    model = saved(gpt_neox(heads=4, layers=5), tmp_path)
    whole, numbers = Decoder.of(model).layers, []
    for stage in range(stages):
        layers = stage_layers(5, stages, stage)
        part = load_stage(tmp_path, torch.float32, CPU, layers)
        assert part.config.num_hidden_layers == len(layers)
        assert not part.training
        for mine, number in zip(Decoder.of(part).layers, layers, strict=True):
            want = whole[number].state_dict()
            assert mine.state_dict().keys() == want.keys()
            assert all(torch.equal(tensor, want[key]) for key, tensor in mine.state_dict().items())
            numbers.append(number)
        assert [p.device.type for p in part.parameters()] == ["cpu"] * len(list(part.parameters()))
    assert numbers == list(range(5))


def test_a_stage_in_half_precision_keeps_its_buffers(tmp_path):
    model = saved(gpt_neox(heads=4, layers=2), tmp_path)
    part = load_stage(tmp_path, torch.float16, CPU, range(1, 2))
    assert {p.dtype for p in part.parameters()} == {torch.float16}
    rotary = {name: buffer for name, buffer in part.named_buffers() if "inv_freq" in name}
    assert rotary
    assert all(torch.equal(buffer, model.get_buffer(name)) for name, buffer in rotary.items())


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("gpt_neox", {"tp_size": 2, "pp_size": 2}),
        ("gemma", {"tp_size": 2, "pp_size": 2}),
        ("gpt_neox", {"pp_size": 3}),
        ("gpt2", {"pp_size": 3}),
        ("gemma", {"ulysses_degree": 2, "ring_degree": 2}),
    ],
    ids=str,
)
def test_a_checkpoint_runs_from_end_to_end(name, layout, tmp_path, monkeypatch):
    model, ids = saved(ARCHITECTURES[name](), tmp_path, max_shard_size="20KB"), tokens(1, 101)

    def work(rank: int) -> Tensor:
        return ds_ring.from_pretrained(tmp_path, {"dtype": "fp32"}, **layout)(ids).logits

    results = mocked_launch(work, math.prod(layout.values()), monkeypatch)
    assert max(relative_error(got, logits(model, ids)) for got in results) < 1e-5


@pytest.mark.parametrize(("stages", "counts"), [(2, "3, 2"), (4, "2, 1, 1, 1"), (5, None)])
def test_stages_of_unequal_layers_are_said_once(stages, counts, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "ds_ring")
    model = saved(gpt_neox(heads=4, layers=5), tmp_path)
    monkeypatch.setenv("WORLD_SIZE", str(stages))
    monkeypatch.delattr(api, "connect")
    for start, of in ((ds_ring.from_pretrained, tmp_path), (ds_ring.init_inference, model)):
        with pytest.raises(NameError, match="connect"):
            start(of, {"dtype": "fp32"}, pp_size=stages)
        said = [line for line in caplog.messages if "stages of" in line]
        caplog.clear()
        assert said == ([f"pp_size={stages} does not divide 5 layers: stages of {counts}"] if counts else [])


def test_gpt_neox_checkpoints_with_the_old_name_of_the_head(tmp_path, read):
    model = saved(gpt_neox(heads=4, layers=2), tmp_path)

    def rename(tensors: dict[str, Tensor]) -> None:
        # transformers itself saves one or the other, depending on its version.
        head = "lm_head.weight" if "lm_head.weight" in tensors else "embed_out.weight"
        tensors["embed_out.weight"] = tensors.pop(head)

    edit(tmp_path, rename)
    part = load_stage(tmp_path, torch.float32, CPU, range(1, 2))
    assert "embed_out.weight" in read
    assert torch.equal(part.get_output_embeddings().weight, model.get_output_embeddings().weight)
    whole = load_model(tmp_path, torch.float32, CPU)
    assert torch.equal(whole.get_output_embeddings().weight, model.get_output_embeddings().weight)


@pytest.mark.parametrize("name", ["gemma", "gpt2"])
def test_a_tied_head_is_loaded_where_the_embedding_is_not(name, tmp_path):
    model = saved(ARCHITECTURES[name](), tmp_path)
    assert not any("lm_head" in tensor for tensor in load_file(tmp_path / SINGLE))
    first, last = (load_stage(tmp_path, torch.float32, CPU, layers) for layers in (range(2), range(2, 3)))
    embedding = model.get_input_embeddings().weight
    assert torch.equal(first.get_input_embeddings().weight, embedding)
    assert first.get_output_embeddings() is None or not list(first.get_output_embeddings().parameters())
    assert torch.equal(last.get_output_embeddings().weight, embedding)
    assert sum(torch.equal(p, embedding) for p in last.parameters() if p.shape == embedding.shape) == 1


def test_a_model_of_several_parts_may_have_its_head_tied_whatever_its_config_says(tmp_path):
    model = tiny_model(tiny_config("got_ocr2"))
    model.save_pretrained(tmp_path)
    count = model.config.get_text_config().num_hidden_layers
    last = load_stage(tmp_path, torch.float32, CPU, range(count - 1, count))
    assert torch.equal(last.get_output_embeddings().weight, model.get_input_embeddings().weight)


def test_a_missing_tensor_is_named(tmp_path):
    saved(llama_gqa(), tmp_path)
    lost = "model.layers.2.mlp.up_proj.weight"
    edit(tmp_path, lambda tensors: tensors.pop(lost))
    for load in (lambda: load_model(tmp_path, torch.float32, CPU), lambda: stage_of(tmp_path, 2, 3)):
        with pytest.raises(CheckpointError, match=r"lacks.* model\.layers\.2\.mlp\.up_proj\.weight$"):
            load()
    # The stage that does not need it does not miss it.
    assert stage_of(tmp_path, 0, 2).config.num_hidden_layers == 2


def test_a_missing_head_is_named_where_it_is_needed(tmp_path):
    saved(llama_gqa(), tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        stage_of(tmp_path, 2, 3)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        load_model(tmp_path, torch.float32, CPU)
    assert stage_of(tmp_path, 0, 2).config.num_hidden_layers == 2


def test_a_tensor_of_another_shape_is_named(tmp_path):
    saved(llama_gqa(), tmp_path)
    wrong = "model.layers.0.mlp.up_proj.weight"
    edit(tmp_path, lambda tensors: tensors.update({wrong: tensors[wrong][:-1].clone()}))
    for load in (lambda: load_model(tmp_path, torch.float32, CPU), lambda: stage_of(tmp_path, 0, 2)):
        with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight of shape \(95, 72\)"):
            load()


def stage_of(directory: Path, start: int, stop: int) -> PreTrainedModel:
    return load_stage(directory, torch.float32, CPU, range(start, stop))


@pytest.mark.parametrize("name", ["gpt_neox", "gemma", "gpt2", "mixtral"])
def test_a_model_from_many_shards(name, tmp_path):
    model = saved(ARCHITECTURES[name](), tmp_path, max_shard_size="50KB")
    shards = set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values())
    assert len(shards) > 1
    loaded, ids = load_model(tmp_path, torch.float32, CPU), tokens(1, 33)
    assert not loaded.training
    assert torch.equal(logits(loaded, ids), logits(model, ids))
