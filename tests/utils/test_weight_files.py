"""One checkpoint, one set of weights: the files are chosen in transformers' order, and a second set is refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.modeling_utils import _get_resolved_checkpoint_files

from ds_ring.errors import CheckpointError
from ds_ring.hf import fingerprint
from ds_ring.hf.checkpoint import Checkpoint
from ds_ring.hf.loading import load_model, load_stage
from ds_ring.utils.weight_files import EXPLICIT, INDEX, SINGLE, weight_files
from tests.helpers.tiny_models import build, llama_gqa

CPU = torch.device("cpu")
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"


def hold(folder: Path, **files: list[str]) -> None:
    """Write a safetensors file for each, with the tensors it names."""
    for name, tensors in files.items():
        save_file({tensor: torch.zeros(1) for tensor in tensors}, folder / name)


def write_index(folder: Path, weight_map: dict[str, str], name: str = INDEX) -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(text: str):
    return pytest.raises(CheckpointError, match=re.escape(text))


def of_transformers(folder: Path, explicit: str | None) -> list[str]:
    """The files that from_pretrained takes."""
    files, _ = _get_resolved_checkpoint_files(str(folder), None, None, True, None, False, explicit)
    assert files is not None
    return files


class TestTransformersOrder:
    @pytest.mark.parametrize(
        ("present", "fields", "taken"),
        [
            ("single", {}, [SINGLE]),
            ("shards", {}, [ONE, TWO]),
            ("index of the single file", {}, [SINGLE]),
            ("both", {EXPLICIT: SINGLE}, [SINGLE]),
            ("both", {EXPLICIT: INDEX}, [ONE, TWO]),
            ("both", {EXPLICIT: TWO}, [TWO]),
            ("both", {EXPLICIT: "other.safetensors.index.json"}, [TWO]),
            ("single", {EXPLICIT: None}, [SINGLE]),
        ],
    )
    def test_the_same_files_are_taken(self, tmp_path, present, fields, taken):
        hold(tmp_path, **{SINGLE: ["a", "b"], ONE: ["a"], TWO: ["b"]})
        write_index(tmp_path, {"a": ONE, "b": TWO})
        write_index(tmp_path, {"b": TWO}, "other.safetensors.index.json")
        if present == "single":
            (tmp_path / INDEX).unlink()
        elif present == "shards":
            (tmp_path / SINGLE).unlink()
        elif present.startswith("index"):
            write_index(tmp_path, {"a": SINGLE, "b": SINGLE})
        assert [file.name for file in weight_files(tmp_path, fields)] == taken
        assert of_transformers(tmp_path, fields.get(EXPLICIT)) == [str(tmp_path / name) for name in taken]

    def test_every_loader_and_the_fingerprint_go_by_it(self, tmp_path):
        """Three sets in one folder: the one that config.json names is loaded whole, by stages, and digested."""
        for seed, folder in enumerate(("single", "sharded", "named")):
            model = build(llama_gqa(), seed=seed)
            model.save_pretrained(tmp_path / folder, max_shard_size="50KB" if folder == "sharded" else "1GB")
        there, named = tmp_path / "single", "named.safetensors"
        for file in (tmp_path / "sharded").glob("model*"):
            file.rename(there / file.name)
        (tmp_path / "named" / SINGLE).rename(there / named)
        fields = json.loads((there / "config.json").read_text())
        for chosen, seed in ((SINGLE, 0), (INDEX, 1), (named, 2)):
            (there / "config.json").write_text(json.dumps(fields | {EXPLICIT: chosen}))
            want = dict(build(llama_gqa(), seed=seed).named_parameters())
            whole, stage = load_model(there, torch.float32, CPU), load_stage(there, torch.float32, CPU, range(2))
            for loaded in (whole, stage):
                found = dict(loaded.named_parameters())
                assert len(found) > 10
                assert all(torch.equal(tensor, want[name]) for name, tensor in found.items())
            digested = {name.split()[-1] for name in fingerprint.of_files(Checkpoint.open(there))}
            assert digested == ({file.name for file in there.glob("model-*")} if chosen == INDEX else {chosen})


class TestTwoSets:
    def test_a_single_file_beside_an_index_of_others(self, tmp_path):
        hold(tmp_path, **{SINGLE: ["a"], ONE: ["a"], TWO: ["b"]})
        write_index(tmp_path, {"a": ONE, "b": TWO})
        with refused(f"{tmp_path} holds two sets of weights, {SINGLE} and 2 file(s) that {INDEX} names ({ONE} first)"):
            weight_files(tmp_path, {})

    @pytest.mark.parametrize("named", [{"a": ONE, "b": TWO}, {"b": TWO, "c": ONE}])
    def test_a_tensor_in_two_shards_of_which_the_index_names_the_one_not_taken(self, tmp_path, named):
        hold(tmp_path, **{ONE: ["a", "c"], TWO: ["a", "b"]})
        write_index(tmp_path, named)
        with refused(f"{tmp_path} has a in {ONE} and in {TWO}: its files are of two saves"):
            weight_files(tmp_path, {})

    def test_a_tensor_in_two_shards_of_which_the_index_names_the_one_taken(self, tmp_path):
        hold(tmp_path, **{ONE: ["a"], TWO: ["a", "b"]})
        write_index(tmp_path, {"a": TWO, "b": TWO, "x": ONE})
        assert [file.name for file in weight_files(tmp_path, {})] == [ONE, TWO]

    def test_an_adapter_which_transformers_applies_where_peft_is_installed(self, tmp_path):
        hold(tmp_path, **{SINGLE: ["a"]})
        (tmp_path / "adapter_config.json").write_text("{}")
        with refused(f"{tmp_path} holds an adapter (adapter_config.json), which is not applied here; merge it"):
            weight_files(tmp_path, {})

    def test_a_distributed_checkpoint_which_transformers_takes_before_all_else(self, tmp_path):
        hold(tmp_path, **{SINGLE: ["a"], "shard-00000-model-00001-of-00001.safetensors": ["a"]})
        with refused(f"{tmp_path} is a distributed checkpoint (shard-00000-model-00001-of-00001.safetensors)"):
            weight_files(tmp_path, {})


class TestNames:
    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("x.bin", "must name a *.safetensors or *.safetensors.index.json file"),
            (5, f"{EXPLICIT}=5 must name a *.safetensors"),
            ("../x.safetensors", "must be a file of the directory itself"),
            ("none.safetensors", f"lacks the file that its config.json names ({EXPLICIT}='none.safetensors')"),
        ],
    )
    def test_a_name_that_is_no_file_of_weights(self, tmp_path, name, words):
        hold(tmp_path, **{SINGLE: ["a"]})
        with refused(words):
            weight_files(tmp_path, {EXPLICIT: name})

    def test_a_variant_is_not_taken_unasked(self, tmp_path):
        hold(tmp_path, **{"model.fp16.safetensors": ["a"]})
        with refused(f"{tmp_path} has neither {SINGLE} nor {INDEX}, but model.fp16.safetensors; if these are the"):
            weight_files(tmp_path, {})
        assert weight_files(tmp_path, {EXPLICIT: "model.fp16.safetensors"}) == [tmp_path / "model.fp16.safetensors"]


@pytest.mark.parametrize("name", [SINGLE, INDEX, ONE, "config.json"])
def test_a_git_lfs_pointer_is_named_as_such(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    hold(tmp_path, **{ONE: ["a"]})
    write_index(tmp_path, {"a": ONE})
    if name == SINGLE:
        (tmp_path / INDEX).unlink()
    (tmp_path / name).write_bytes(POINTER)
    with refused(f"{tmp_path / name} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("folder", "is a folder where a file is expected; put the weights there, or take it away"),
        ("link", "is a link to nowhere, where there is no file; put the weights there, or take it away"),
        ("fifo", "is no regular file; put the weights there, or take it away"),
    ],
)
@pytest.mark.parametrize("name", [SINGLE, INDEX, TWO, "named.safetensors"])
def test_what_stands_where_weights_are_expected_is_named_as_what_it_is(tmp_path, name, kind, words):
    hold(tmp_path, **{ONE: ["a"]})
    if name == TWO:
        write_index(tmp_path, {"a": ONE, "b": TWO})
    take_the_place(tmp_path / name, kind)
    with refused(f"{tmp_path / name} {words}"):
        weight_files(tmp_path, {EXPLICIT: name} if name == "named.safetensors" else {})


@pytest.mark.parametrize(("kind", "words"), [("folder", "is a folder where a file"), ("link", "is a link to nowhere")])
def test_what_stands_where_a_config_is_expected_is_named_as_what_it_is(tmp_path, kind, words):
    take_the_place(tmp_path / "config.json", kind)
    with refused(f"{tmp_path / 'config.json'} {words}"):
        Checkpoint.open(tmp_path)


def test_a_link_without_a_file_is_passed_over_where_transformers_takes_the_index(tmp_path):
    hold(tmp_path, **{ONE: ["a"]})
    write_index(tmp_path, {"a": ONE})
    take_the_place(tmp_path / SINGLE, "link")
    assert [file.name for file in weight_files(tmp_path, {})] == [ONE]
    assert of_transformers(tmp_path, None) == [str(tmp_path / ONE)]


def take_the_place(file: Path, kind: str) -> None:
    if kind == "folder":
        file.mkdir()
    elif kind == "link":
        file.symlink_to("nowhere")
    else:
        os.mkfifo(file)
