"""Text as tokens, and the checkpoints that carry the tokenizer."""

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
