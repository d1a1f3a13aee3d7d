"""Checkpoints that open, and those that are refused before anything is read from them."""

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ds_ring.errors import CheckpointError
from ds_ring.hf import fingerprint
from ds_ring.hf.checkpoint import Checkpoint
from ds_ring.utils.model_config import read_config
from ds_ring.utils.weight_files import INDEX, SINGLE

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
EMBED, HEAD = torch.arange(12.0).view(3, 4), torch.ones(2, 5, dtype=torch.bfloat16)


@pytest.fixture
def single(tmp_path) -> Path:
    """A checkpoint in one file."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"embed": EMBED, "head": HEAD}, tmp_path / SINGLE)
    return tmp_path


@pytest.fixture
def sharded(tmp_path) -> Path:
    """The same tensors in two files and an index."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"embed": EMBED}, tmp_path / FIRST)
    save_file({"head": HEAD}, tmp_path / SECOND)
    write_index(tmp_path, {"embed": FIRST, "head": SECOND})
    return tmp_path


def write_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(text: str):
    """Expect a CheckpointError whose text begins so."""
    return pytest.raises(CheckpointError, match=f"^{re.escape(text)}")


class TestIdentity:
    def test_a_copy_is_the_same_and_every_byte_of_a_small_file_counts(self, sharded):
        before = fingerprint.of_files(Checkpoint.open(sharded))
        assert list(before) == [f"the checkpoint's {name}" for name in (FIRST, SECOND)]
        save_file({"embed": EMBED}, sharded / FIRST)
        assert fingerprint.of_files(Checkpoint.open(sharded)) == before
        for index in range(EMBED.numel()):
            save_file({"embed": EMBED + (torch.arange(12).view(3, 4) == index)}, sharded / FIRST)
            after = fingerprint.of_files(Checkpoint.open(sharded))
            assert [name for name in before if before[name] != after[name]] == [f"the checkpoint's {FIRST}"]

    def test_of_a_large_file_the_beginning_the_end_and_some_between_are_read(self, single, monkeypatch):
        monkeypatch.setattr(fingerprint, "BLOCK_BYTES", 10)
        save_file({"embed": torch.zeros(1000, dtype=torch.uint8)}, single / SINGLE)
        content, checkpoint = (single / SINGLE).read_bytes(), Checkpoint.open(single)
        before, seen = fingerprint.of_files(checkpoint), []
        for index in range(len(content)):
            (single / SINGLE).write_bytes(content[:index] + b"\1" + content[index + 1 :])
            if fingerprint.of_files(checkpoint) != before:
                seen.append(index)
        assert len(seen) == 8 * 10
        assert (seen[:10], seen[-1]) == ([*range(10)], len(content) - 1)


class TestGood:
    @pytest.mark.parametrize("as_path", [str, Path])
    def test_a_single_file(self, single, as_path):
        checkpoint = Checkpoint.open(as_path(single))
        assert checkpoint.directory == single
        assert checkpoint.files == {"embed": single / SINGLE, "head": single / SINGLE}

    def test_shards_with_an_index(self, sharded):
        assert Checkpoint.open(sharded).files == {"embed": sharded / FIRST, "head": sharded / SECOND}

    @pytest.mark.parametrize("layout", ["single", "sharded"])
    def test_tensors_are_read_when_they_are_indexed(self, layout, request):
        tensors = Checkpoint.open(request.getfixturevalue(layout)).lazy_tensors()
        assert set(tensors) == {"embed", "head"}
        assert tensors["embed"].get_shape() == [3, 4]
        assert torch.equal(tensors["embed"][1:, :2], EMBED[1:, :2])
        assert torch.equal(tensors["head"][:], HEAD)
        assert tensors["head"][:].dtype == torch.bfloat16


class TestRefused:
    def test_no_such_directory(self, tmp_path):
        with refused(f"{tmp_path}/none is not a checkpoint directory, nor a hub id in the local cache; get one with"):
            Checkpoint.open(tmp_path / "none")

    def test_a_file_instead_of_a_directory(self, single):
        with refused(f"{single / SINGLE} is not a checkpoint directory"):
            Checkpoint.open(single / SINGLE)

    def test_no_config(self, single):
        (single / "config.json").unlink()
        with refused(f"{single} has no config.json"):
            Checkpoint.open(single)

    @pytest.mark.parametrize(
        ("content", "text"),
        [
            (b"{", "is not JSON: Expecting property name"),
            (b"\xff", "is not JSON: 'utf-8' codec can't decode"),
            (b"null", "must hold a JSON object, not None"),
            (b'["auto_map"]', "must hold a JSON object, not ['auto_map']"),
        ],
    )
    def test_a_config_that_is_no_json_object(self, single, content, text):
        (single / "config.json").write_bytes(content)
        with refused(f"{single}/config.json {text}"):
            Checkpoint.open(single)

    def test_a_config_that_brings_its_own_code(self, single):
        (single / "config.json").write_text('{"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}')
        with refused(
            f"{single}/config.json asks to run its own code (auto_map); only classes of transformers are loaded"
        ):
            Checkpoint.open(single)

    @pytest.mark.parametrize("content", [{"quant_method": "gptq", "bits": 4}, {"bits": 4}, "any"])
    def test_quantised_weights(self, single, content):
        (single / "config.json").write_text(json.dumps({"quantization_config": content}))
        with refused(f"{single}/config.json has a quantization_config ("):
            Checkpoint.open(single)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"hidden_size": "64"}, "field 'hidden_size': TypeError: Field 'hidden_size' expected int, got str"),
            ({"hidden_size": 65}, "The hidden size (65) is not a multiple of the number of attention heads (4)"),
            ({"num_attention_heads": 0}, "ZeroDivisionError: "),
            ({"dtype": "float17"}, "has no attribute 'float17'"),
            ({"model_type": "nonsense"}, "model_type='nonsense' is none that transformers 5."),
        ],
        ids=str,
    )
    def test_a_config_of_wrong_values(self, single, change, words):
        config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, **change}
        (single / "config.json").write_text(json.dumps(config))
        with refused(f"{single}/config.json holds no config that transformers can read: ") as found:
            read_config(single)
        assert words in str(found.value)
        assert "\n" not in str(found.value)

    def test_no_weights(self, single):
        (single / SINGLE).unlink()
        with refused(f"{single} has no weights; save it with model.save_pretrained(…), as {SINGLE}"):
            Checkpoint.open(single)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
    def test_only_pickled_weights_which_are_never_unpickled(self, single, name):
        (single / SINGLE).unlink()
        (single / name).write_bytes(pickle.dumps(_Bomb(str(single / "ran"))))
        with refused(f"{single} has only pickled weights ({name}), which can run code; save it with"):
            Checkpoint.open(single)
        assert not (single / "ran").exists()

    def test_pickled_weights_beside_safetensors_do_no_harm(self, single):
        (single / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(str(single / "ran"))))
        assert set(Checkpoint.open(single).files) == {"embed", "head"}
        assert not (single / "ran").exists()

    @pytest.mark.parametrize("kept", [0, 4, 20, -1])
    @pytest.mark.parametrize(("layout", "shard"), [("single", SINGLE), ("sharded", FIRST), ("sharded", SECOND)])
    def test_a_truncated_file(self, request, layout, shard, kept):
        directory = request.getfixturevalue(layout)
        content = (directory / shard).read_bytes()
        (directory / shard).write_bytes(content[:kept])
        with refused(f"{directory / shard} is damaged or truncated: "):
            Checkpoint.open(directory)

    def test_a_file_that_is_not_safetensors(self, single):
        (single / SINGLE).write_bytes(b"no tensors at all\n")
        with refused(f"{single / SINGLE} is damaged or truncated: "):
            Checkpoint.open(single)

    @pytest.mark.parametrize("shard", [FIRST, SECOND])
    def test_a_missing_shard(self, sharded, shard):
        (sharded / shard).unlink()
        with refused(f"{sharded} lacks the shard {shard} that its index names"):
            Checkpoint.open(sharded)

    @pytest.mark.parametrize(
        "outside", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "./x.safetensors"]
    )
    def test_an_index_that_points_outside(self, sharded, outside):
        save_file({"secret": EMBED}, sharded.parent / "secret.safetensors")
        write_index(sharded, {"embed": FIRST, "secret": outside})
        with refused(f"{sharded / INDEX} points outside its directory: {outside!r}"):
            Checkpoint.open(sharded)

    @pytest.mark.parametrize("name", ["..", ".", ""])
    def test_an_index_that_points_at_a_directory(self, sharded, name):
        write_index(sharded, {"embed": name})
        with pytest.raises(CheckpointError, match="points outside its directory"):
            Checkpoint.open(sharded)

    @pytest.mark.parametrize(
        "content", [b"{", b"[]", b"{}", b"\xff", b'{"weight_map": 3}', b'{"weight_map": {"embed": 3}}']
    )
    def test_an_index_of_another_form(self, sharded, content):
        (sharded / INDEX).write_bytes(content)
        with refused(f"{sharded / INDEX} is not a safetensors index: "):
            Checkpoint.open(sharded)


class _Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_the_bomb_used_above_is_live(tmp_path):
    pickle.loads(pickle.dumps(_Bomb(str(tmp_path / "ran"))))
    assert (tmp_path / "ran").exists()
