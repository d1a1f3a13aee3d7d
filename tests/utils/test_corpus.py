"""Text as tokens, and the checkpoints that carry the tokenizer."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_ring.cli.seeded_checkpoint import byte_tokenizer, make_checkpoint
from ds_ring.errors import CheckpointError, ConfigError, InputError
from ds_ring.utils.corpus import load_tokenizer, read_text, text_windows, token_stream


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    directory = tmp_path_factory.mktemp("small")
    make_checkpoint("ds_configs/models/small.json", directory, seed=3, dtype="fp32", device="cpu")
    return directory


@pytest.mark.parametrize("text", ["plain", "Größe – 長さ 🙂\n\ttab", " leading and trailing "])
def test_bytes_survive_the_round_trip_one_token_each(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert max(ids) < 256
    assert tokenizer.decode(ids) == text


def test_a_checkpoint_loads_by_from_pretrained_and_is_seeded(small, tmp_path):
    again = tmp_path / "again"
    parameters = make_checkpoint("ds_configs/models/small.json", again, seed=3, dtype="fp32", device="cpu")
    first, second = (AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32) for d in (small, again))
    assert parameters == sum(p.numel() for p in first.parameters())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(small)("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"]
    assert not list(small.glob("*.bin"))


def test_a_vocabulary_too_small_for_bytes_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox", "vocab_size": 100}')
    with pytest.raises(ConfigError, match="vocab_size=100 is too small for bytes; it must be at least 257"):
        make_checkpoint(tmp_path, tmp_path / "out", seed=0, dtype="fp32", device="cpu")


def test_without_files_the_text_is_the_language_reference(small):
    stream = token_stream(small, [])
    assert len(stream) > 100_000
    assert "Assert statements" in load_tokenizer(small).decode(stream[:300])


def test_windows_are_spread_over_the_text_and_wrap_round():
    windows = text_windows(torch.arange(10), batch=3, length=6)
    assert windows.tolist() == [[0, 1, 2, 3, 4, 5], [3, 4, 5, 6, 7, 8], [6, 7, 8, 9, 0, 1]]


def test_files_that_are_no_text_are_refused_by_name(tmp_path):
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Größe".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt is not UTF-8 text: .* at byte 2"):
        read_text([str(latin)])
    with pytest.raises(InputError, match=r"cannot read .*none\.txt: No such file"):
        read_text([str(tmp_path / "none.txt")])


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        load_tokenizer(tmp_path / "none")


class TestTokenizersThatCannotBeRead:
    @pytest.fixture
    def folder(self, tmp_path):
        byte_tokenizer().save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        load_tokenizer(tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ({"version": "2.0"}, "Exception: Unknown tokenizer version '2.0'"),
            ({"model": {"type": "Newer", "vocab": {}}}, "Exception: "),
            ({"pre_tokenizer": {"type": "Newer"}}, "Exception: data did not match any variant"),
            ([], "Exception: "),
        ],
    )
    def test_one_of_a_newer_version(self, folder, content, words):
        file = folder / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | content if content else content))
        with pytest.raises(CheckpointError, match=rf"^{file} cannot be read by tokenizers \d+\.") as found:
            load_tokenizer(folder)
        assert words in str(found.value)
        assert str(found.value).endswith("it is damaged, or of a newer version of that package")
        assert "\n" not in str(found.value)

    @pytest.mark.parametrize("content", ["[]", "{", '{"model_max_length": {}}', '{"tokenizer_class": 5}'])
    def test_wrong_settings(self, folder, content):
        (folder / "tokenizer_config.json").write_text(content)
        with pytest.raises(
            CheckpointError, match=f"^{folder} holds no tokenizer that transformers can read: "
        ) as found:
            load_tokenizer(folder)
        assert "\n" not in str(found.value)

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt"])
    def test_a_git_lfs_pointer(self, folder, name):
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
        with pytest.raises(CheckpointError, match=rf"^{folder / name} is a Git LFS pointer, .*`git lfs pull`"):
            load_tokenizer(folder)

    @pytest.mark.parametrize("fields", [{"dtype": "auto"}, {"attn_implementation": "x/y"}])
    def test_the_config_beside_it_is_read_as_for_weights(self, folder, fields):
        """transformers looks into config.json for a tokenizer as well, and fails at what a run takes."""
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", **fields}))
        assert len(load_tokenizer(folder)("ab")["input_ids"]) == 2

    def test_a_config_that_cannot_be_read_is_named_itself(self, folder):
        (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": "x"}')
        with pytest.raises(CheckpointError, match=r"config\.json holds no config .*'vocab_size'"):
            load_tokenizer(folder)
