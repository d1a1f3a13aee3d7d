"""Prompts from the command line and from files, as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_ring.cli.tokenizing import plain, tokenized
from ds_ring.config import RunConfig
from ds_ring.errors import InputError, in_one_line
from ds_ring.hf.checkpoint import Checkpoint
from ds_ring.hf.dims import model_dims
from ds_ring.planning.validation import check_positions
from ds_ring.utils.corpus import load_tokenizer, read_text
from ds_ring.utils.model_config import read_config


def read(
    config: RunConfig, texts: Sequence[str], files: Sequence[str], max_new_tokens: int, *, raw: bool = False
) -> tuple[Any, list[list[int]]]:
    """(tokenizer, token ids of each of ``texts`` and then of each of ``files``). Reads no weights.

    Each is a message of a user in the tokenizer's chat template, where it has one and ``raw`` is not set.

    Raises:
        InputError: no prompt, an empty one, one for which the model has too few positions, or a file that cannot be
            read. CheckpointError: no checkpoint, or no tokenizer in it.
    """
    names = [*(f"prompt {number}" for number in range(1, len(texts) + 1)), *files]
    texts = [*texts, *read_text(files)]
    if not texts:
        raise InputError("no prompt: give --prompt TEXT… or --prompt-file FILE…")
    Checkpoint.open(config.checkpoint)
    tokenizer = load_tokenizer(config.checkpoint)
    dims, prompts = model_dims(read_config(config.checkpoint)), list[list[int]]()
    for number, (name, text) in enumerate(zip(names, texts, strict=True)):
        prompts.append(
            tokenized(
                lambda part: tokens_of(tokenizer, part, raw=raw),
                text,
                name,
                lambda count: check_positions(count, max_new_tokens, dims),
            )
        )
        if not text.strip() or not prompts[-1]:  # a tokenizer may put a token of its own even before an empty text
            raise InputError(f"prompt {number + 1} of {len(texts)} is empty")
    return tokenizer, prompts


def tokens_of(tokenizer: Any, text: str, *, raw: bool) -> list[int]:
    """Token ids of ``text`` as a user's message in the chat template, or as it is where there is none or with
    ``raw``."""
    found: Any
    if raw or not tokenizer.chat_template:
        found = plain(tokenizer)(text)
    else:
        messages = [{"role": "user", "content": text}]
        try:
            found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        except Exception as error:  # a template is a program of the checkpoint's
            raise InputError(
                f"the tokenizer's chat template fails: {in_one_line(error)}; --raw leaves it out"
            ) from None
    return list(found)


def sized(config: RunConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> RunConfig:
    """``config`` for the planner: with the number and length of ``prompts`` as the workload, unless these are given.

    Unchanged where the layout is not planned."""
    if not config.parallel.auto:
        return config
    own = {"batch_size": len(prompts), "max_length": max(map(len, prompts)) + max_new_tokens}
    given = config.workload.model_fields_set
    return RunConfig.load(config, **{name: value for name, value in own.items() if name not in given})


def left_padded(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(token ids [B, C], mask [B, C]) of ``sequences``, padded at their beginnings."""
    columns = max(map(len, sequences))
    ids = torch.tensor([[pad_id] * (columns - len(tokens)) + list(tokens) for tokens in sequences])
    return ids, torch.tensor([[0] * (columns - len(tokens)) + [1] * len(tokens) for tokens in sequences])
