"""Texts as tokens: once each, with what the tokenizer adds by itself; a long one is refused by its beginning."""

from __future__ import annotations

import logging

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_ring.cli import documents, prompts, scoring_job, tokenizing
from ds_ring.cli.seeded_checkpoint import byte_tokenizer
from ds_ring.config import RunConfig
from ds_ring.errors import InputError
from tests.helpers.launching import save
from tests.helpers.mocked_world import serve
from tests.helpers.tiny_models import gpt2, llama_gqa

TEXT = "a text that ends here"
BOS = 256


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory):
    """A checkpoint whose tokenizer begins every text with BOS, as those of Llama 3, Gemma and Mistral do."""
    folder = save(tmp_path_factory.mktemp("bos"), llama_gqa(vocab_size=257))
    tokenizer = byte_tokenizer()
    bos = tokenizer.convert_ids_to_tokens(BOS)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, BOS)])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def document(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text(TEXT)
    return str(file)


def test_score_feeds_what_the_tokenizer_gives(with_bos, document):
    config = RunConfig.load({"dtype": "fp32"}, model=str(with_bos))
    want = AutoTokenizer.from_pretrained(with_bos)(TEXT)["input_ids"]
    assert want[0] == BOS
    (read,) = documents.read_files(config, [document])
    (without,) = documents.read_files(config, [document], special_tokens=False)
    assert (read.id, read.ids_T.tolist(), without.ids_T.tolist()) == (document, want, want[1:])
    _, found = prompts.read(config, [TEXT], [document], 8)
    assert found == [want, want]


def test_the_score_is_that_of_transformers_labels(with_bos, document):
    config = RunConfig.load({"dtype": "fp32"}, model=str(with_bos))
    model = AutoModelForCausalLM.from_pretrained(with_bos, dtype=torch.float32).eval()
    inputs = AutoTokenizer.from_pretrained(with_bos)(TEXT, return_tensors="pt")
    with torch.no_grad():
        want = float(model(inputs["input_ids"], labels=inputs["input_ids"]).loss)
    texts = documents.read_files(config, [document])
    for found in serve(model, lambda engine: scoring_job.of_files(engine, texts, lambda line: None), ring_degree=2):
        assert found["documents"][0]["tokens"] == len(TEXT) + 1
        assert found["documents"][0]["nll"] == pytest.approx(want, rel=1e-5)


@pytest.fixture
def short_parts(monkeypatch):
    monkeypatch.setattr(tokenizing, "FIRST_PART", 1000)


def test_a_long_text_is_refused_by_its_beginning(with_bos, tmp_path, monkeypatch, short_parts):
    seen = []
    plain = tokenizing.plain
    monkeypatch.setattr(documents, "plain", lambda t, s: lambda text: seen.append(len(text)) or plain(t, s)(text))
    file, config = tmp_path / "long.txt", RunConfig.load({"dtype": "fp32"}, model=str(with_bos), max_length=5000)
    file.write_text("x" * 100_000)
    with pytest.raises(InputError) as error:
        documents.read_files(config, [str(file)])
    assert seen == [1000, 8000]
    assert str(error.value) == (
        f"the first 8,000 of 100,000 characters of {file} are too many: {file} has 7537 tokens, more than "
        "max_length=5000; raise --max-length"
    )
    learned = RunConfig.load({}, model=str(save(tmp_path / "gpt2", gpt2(vocab_size=257, n_positions=2048))))
    with pytest.raises(InputError, match=r"^the first 1,000 of 2,100 characters of prompt 1 are too many: 886 tokens"):
        prompts.read(learned, ["x" * 2100], [], 5000)


def test_a_long_text_that_fits_says_how_long_it_takes(caplog, short_parts):
    calls = []

    def tokenize(text: str) -> list[int]:
        calls.append(len(text))
        return [1] * (len(text) // 4)

    with caplog.at_level(logging.INFO, logger="ds_ring"):
        found = tokenizing.tokenized(tokenize, "x" * 20_000, "book.txt", lambda count: None)
    assert len(found) == 5000
    assert calls == [1000, 8000, 20_000]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("book.txt: 20,000 characters, about 5,000 tokens, 0 s to tokenize")


def test_a_cut_word_does_not_make_a_text_too_long(short_parts):
    """The beginning of a text may have a few tokens more by itself."""

    def check(count: int) -> None:
        if count > 1000:
            raise InputError("too many")

    found = tokenizing.tokenized(lambda text: [1] * min(len(text), 1000), "x" * 5000, "a.txt", check)
    assert len(found) == 1000


def test_what_is_no_text_is_refused_in_one_line(with_bos, tmp_path):
    config = RunConfig.load({"dtype": "fp32"}, model=str(with_bos))
    file = tmp_path / "binary"
    file.write_bytes(b"\x7fELF\xff\xfe")
    for read in (lambda: documents.read_files(config, [str(file)]), lambda: prompts.read(config, [], [str(file)], 8)):
        with pytest.raises(InputError, match=r"binary is not UTF-8 text: invalid start byte at byte 4$"):
            read()
    with pytest.raises(InputError, match=r"^prompt 2 is not UTF-8 text$"):
        prompts.read(config, ["x", b"\xff".decode(errors="surrogateescape")], [], 8)
    with pytest.raises(InputError, match=r"cannot read .*: Is a directory"):
        prompts.read(config, [], [str(tmp_path)], 8)
