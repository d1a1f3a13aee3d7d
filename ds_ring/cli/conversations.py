"""Conversations as tokens, of which the assistant's are known: by the chat template's own marks, or by its text."""

from __future__ import annotations

import re
from typing import Any

from ds_ring.errors import InputError, in_one_line

Messages = list[dict[str, Any]]

MARKS = re.compile(r"\{%-?\s*generation\b")
"""A template that marks the assistant's tokens itself."""


def conversation(tokenizer: Any, messages: Messages) -> tuple[list[int], list[bool]]:
    """(token ids, which of them are the assistant's) of ``messages`` in the tokenizer's chat template.

    The assistant's are those that it would generate: what it says, and the tokens that end its turn. Not the beginning
    of its turn, which a prompt has, nor the blanks behind its end.

    Raises:
        InputError: no template, one that fails, or one by which the assistant's tokens cannot be told.
    """
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template for messages; give text or input_ids")
    try:
        if MARKS.search(str(tokenizer.chat_template)):
            marked = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            return list(marked["input_ids"]), [bool(each) for each in marked["assistant_masks"]]
        spans, text = _spans(tokenizer, messages)
    except InputError:
        raise
    except Exception as error:  # a template is a program of the checkpoint's
        raise InputError(f"the tokenizer's chat template fails: {in_one_line(error)}") from None
    if not tokenizer.is_fast:
        raise InputError("the tokenizer does not say where its tokens are in a text; give input_ids and target_ids")
    # The template has put in special tokens itself.
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(found["input_ids"]), [
        any(begin <= start < end for begin, end in spans) for start, _ in found["offset_mapping"]
    ]


def next_targets(ids: list[int], counted: list[bool], unscored: int) -> list[int]:
    """Of each token the next one where that is counted."""
    return [ids[t + 1] if t + 1 < len(ids) and counted[t + 1] else unscored for t in range(len(ids))]


def _spans(tokenizer: Any, messages: Messages) -> tuple[list[tuple[int, int]], str]:
    """(where in the text the assistant's turns are, the text of the whole conversation)."""

    def render(part: Messages, prompt: bool) -> str:
        return str(tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=prompt))

    text, spans = render(messages, False), list[tuple[int, int]]()
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(messages[:number], True), render(messages[: number + 1], False)
            if not (text.startswith(before) and text.startswith(after) and len(before) <= len(after)):
                raise InputError(
                    f"the chat template gives message {number + 1} another text in the whole conversation than where "
                    f"it is the last, so the assistant's tokens cannot be told; give input_ids and target_ids"
                )
            spans.append((len(before), len(after.rstrip())))
    return spans, text
