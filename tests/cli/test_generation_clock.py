"""The text of a completion on a terminal."""

from __future__ import annotations

import torch

from ds_ring.cli.generation_clock import StderrText
from ds_ring.cli.seeded_checkpoint import byte_tokenizer
from ds_ring.utils import strict_json


def test_no_control_character_of_a_completion_reaches_the_terminal(capsys):
    tokenizer, text = byte_tokenizer(), "a \x1b[2J\x07 b\tc\nd\r e\x00 f\n"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids[0]) == text
    streamer = StderrText(tokenizer)
    streamer.put(torch.tensor([[1, 2]]))  # the prompt
    for token in ids[0]:
        streamer.put(token[None])
    streamer.end()
    printed = capsys.readouterr()
    assert printed.err == "a \\x1b[2J\\x07 b\tc\nd\\x0d e\\x00 f\n\n"
    assert printed.out == ""


def test_the_result_has_the_text_as_it_is():
    assert strict_json.dumps({"text": "\x1b[2J é"}) == '{"text": "\\u001b[2J \\u00e9"}'
