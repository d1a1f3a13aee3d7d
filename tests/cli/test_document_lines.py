"""JSON Lines of documents: what is read, and what is refused by the numbers of its lines, before any work."""

import json

import pytest
import torch

from ds_ring.cli import documents, score
from ds_ring.cli.document_lines import read_lines
from ds_ring.config import RunConfig
from ds_ring.errors import InputError
from tests.helpers.launching import save
from tests.helpers.tiny_models import gpt2

GOOD = '{"text": "a"}'
BAD = {
    "{": "not JSON: Expecting property name enclosed in double quotes at character 2",
    "[1]": "not a JSON object",
    '{"id": "a"}': "exactly one of text, input_ids, messages is needed, not 0 of them",
    '{"text": "a", "input_ids": [1]}': "exactly one of text, input_ids, messages is needed, not 2 of them",
    '{"text": 3}': "text must be a string, not a number",
    '{"text": null}': "text must be a string, not null",
    '{"text": "a", "txt": 1}': "unknown field 'txt'; known are id, target_ids, text, input_ids, messages",
    '{"id": 1.5, "text": "a"}': "id must be text or a whole number, not 1.5",
    '{"id": true, "text": "a"}': "id must be text or a whole number, not true or false",
    '{"id": NaN, "text": "a"}': "id must be text or a whole number, not nan",
    '{"id": null, "text": "a"}': "id must be text or a whole number, not null",
    '{"text": "a", "target_ids": [1]}': "target_ids go with input_ids, not with text",
    '{"input_ids": "a"}': "input_ids must be a list of whole numbers of at least 0",
    '{"input_ids": [1, -1]}': "input_ids must be a list of whole numbers of at least 0",
    '{"input_ids": [1, true]}': "input_ids must be a list of whole numbers of at least 0",
    '{"input_ids": [1, 2], "target_ids": [1]}': "must be a list of 2, as many as input_ids, not 1 of them",
    '{"input_ids": [1, 2], "target_ids": null}': "must be a list of 2, as many as input_ids, not null",
    '{"input_ids": [1, 2], "target_ids": [1, -1]}': "target_ids must be token ids, or -100 at tokens that are left out",
    '{"input_ids": [1, 2], "target_ids": [[1], 2]}': "target_ids must be token ids, or -100",
    '{"input_ids": [1, 2], "target_ids": [[1], [1, 2]]}': "equally many targets for each token, at least one",
    '{"input_ids": [1, 2], "target_ids": [[], []]}': "equally many targets for each token, at least one",
    '{"messages": []}': "messages must be a list of objects, each with a role",
    '{"messages": [{"content": "a"}]}': "messages must be a list of objects, each with a role",
    "[" * 100_000: "not JSON that can be read: maximum recursion depth exceeded",
}


def write(path, *lines):
    path.write_bytes(b"".join(line.encode() + b"\n" if isinstance(line, str) else line + b"\n" for line in lines))
    return str(path)


@pytest.mark.parametrize(("line", "says"), BAD.items(), ids=[line[:40] for line in BAD])
def test_a_bad_line_is_named(line, says, tmp_path):
    path = write(tmp_path / "in.jsonl", GOOD, "", line, GOOD)
    with pytest.raises(InputError) as error:
        read_lines(path)
    assert str(error.value).startswith(f"{path} line 3: ")
    assert says in str(error.value)


def test_all_bad_lines_are_numbered(tmp_path):
    path = write(tmp_path / "in.jsonl", GOOD, b'"\xff"', GOOD, *["1"] * 10)
    with pytest.raises(InputError) as error:
        read_lines(path)
    assert str(error.value) == (
        f"{path} line 2: not UTF-8 text: invalid start byte at byte 1 of the line; "
        "10 more bad lines: 4, 5, 6, 7, 8, 9, 10, 11, …"
    )


def test_a_file_without_documents_or_that_is_none(tmp_path):
    with pytest.raises(InputError, match=r"in.jsonl holds no document$"):
        read_lines(write(tmp_path / "in.jsonl", "", " "))
    with pytest.raises(InputError, match="cannot read none: No such file or directory"):
        read_lines("none")
    with pytest.raises(InputError, match="must be a regular file"):
        read_lines(str(tmp_path))


def test_lines_are_numbered_as_they_stand_and_documents_counted(tmp_path):
    path = write(tmp_path / "in.jsonl", "", GOOD, '{"id": "x", "text": ""}', "", '{"id": 7, "input_ids": [1]}')
    assert [(line.number, line.index, line.id) for line in read_lines(path)] == [(2, 0, 0), (3, 1, "x"), (5, 2, 7)]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Of a model of 257 tokens and 100 positions, whose tokenizer gives a token a byte."""
    folder = save(tmp_path_factory.mktemp("model"), gpt2(n_layer=1, vocab_size=257, n_positions=100))
    return RunConfig.load({"dtype": "fp32"}, model=str(folder))


def test_documents_are_read_as_tokens_and_targets(config, tmp_path):
    lines = [{"text": "ab"}, {"text": ""}, {"input_ids": [5, 6], "target_ids": [[1, 2], [-100, 3]]},
             {"input_ids": [5], "target_ids": [9]}, {"id": "long", "text": "x" * 101}, {"input_ids": [3] * 200},
             {"input_ids": []}]  # fmt: skip
    path = write(tmp_path / "in.jsonl", *map(json.dumps, lines))
    found = documents.read_json_lines(config, path)
    assert [each.ids_T.tolist() for each in found] == [[64, 65], [], [5, 6], [5], [], [], []]
    assert [None if each.targets is None else each.targets.tolist() for each in found] == [
        None, None, [[1, 2], [-100, 3]], [9], None, None, None,
    ]  # fmt: skip
    limit = "more than the model's max_position_embeddings=100"
    assert [each.too_long for each in found] == [
        None, None, None, None, f"it has 101 tokens, {limit}", f"it has 200 tokens, {limit}", None,
    ]  # fmt: skip
    assert found[0].ids_T.dtype == torch.int32
    (cut,) = documents.read_json_lines(RunConfig.load(config, max_length=1), write(tmp_path / "2", '{"text": "ab"}'))
    assert cut.too_long == "it has 2 tokens, more than max_length=1; raise --max-length"


@pytest.mark.parametrize(
    ("line", "says"),
    [({"input_ids": [1, 257]}, "input_ids have 257, outside the vocabulary of 257"),
     ({"input_ids": [1, 2], "target_ids": [2, 300]}, "target_ids have 300, outside the vocabulary of 257"),
     ({"input_ids": [1], "target_ids": [[2, 10**30]]}, f"target_ids have {10**30}, outside the vocabulary of 257"),
     ({"messages": [{"role": "user", "content": "a"}]}, "the tokenizer has no chat template for messages; give text"),
     ({"text": "\ud800"}, "its text is not UTF-8 text")],
)  # fmt: skip
def test_what_shows_with_the_model_is_named_by_line_too(line, says, config, tmp_path):
    path = write(tmp_path / "in.jsonl", GOOD, json.dumps(line))
    with pytest.raises(InputError) as error:
        documents.read_json_lines(config, path)
    assert str(error.value).startswith(f"{path} line 2: {says}")


@pytest.mark.parametrize(
    ("words", "says"),
    [("", "no documents: give --text FILE… or --documents FILE.jsonl"),
     ("--text in.jsonl --scores out", "--scores goes with --documents FILE.jsonl"),
     ("--text in.jsonl --resume", "--resume goes with --documents FILE.jsonl"),
     ("--text in.jsonl --top-k 2", "--top-k goes with --documents FILE.jsonl"),
     ("--documents in.jsonl", "--documents needs --scores FILE.jsonl"),
     ("--documents in.jsonl --text a --scores out", "--text and --documents exclude each other"),
     ("--documents bad.jsonl --scores out", "bad.jsonl line 1: not a JSON object"),
     ("--documents in.jsonl --scores old", "--scores old is there already: --resume goes on with it; else name"),
     ("--documents in.jsonl --scores /dev/null", "--scores /dev/null is no regular file")],
)  # fmt: skip
def test_options_that_do_not_go_together(words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", GOOD)
    write(tmp_path / "bad.jsonl", "1")
    write(tmp_path / "old", "{}")
    with pytest.raises(InputError) as error:
        score.check(score.make_parser().parse_args(["--model", "model", *words.split()]))
    assert str(error.value).startswith(says)
