"""Documents to be scored, as tokens: of text files, or of JSON Lines."""

# Shapes: T tokens of a document, A targets of a token.
from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_ring.cli.conversations import conversation, next_targets
from ds_ring.cli.document_lines import Line, of_lines, read_lines
from ds_ring.cli.tokenizing import plain, tokenized
from ds_ring.config import RunConfig
from ds_ring.errors import InputError
from ds_ring.hf.checkpoint import Checkpoint
from ds_ring.hf.dims import model_dims
from ds_ring.utils.corpus import load_tokenizer, read_text
from ds_ring.utils.model_config import read_config
from ds_ring.utils.unscored import UNSCORED


@dataclass(frozen=True, eq=False)
class Document:
    """One text.

    Attributes:
        id: a file's name, or what the line says.
        index: its place among the documents.
        ids_T: its tokens, int32; none where it is too long.
        targets: [T] or [T, A], int32: what each token is scored for, -100 for nothing; None: the next token.
        too_long: how it is too long; None where it is not.
    """

    id: str | int
    index: int
    ids_T: Tensor
    targets: Tensor | None = None
    too_long: str | None = None

    def __len__(self) -> int:
        return len(self.ids_T)

    @property
    def targets_a_token(self) -> int | None:
        """None: one, without a list around it."""
        return None if self.targets is None or self.targets.dim() == 1 else self.targets.shape[1]

    def digest(self) -> bytes:
        """Equal for documents that are scored alike."""
        parts = [repr((self.id, self.index, self.too_long)).encode(), self.ids_T.numpy().tobytes()]
        if self.targets is not None:
            parts += [str(tuple(self.targets.shape)).encode(), self.targets.numpy().tobytes()]
        return hashlib.sha256(b"|".join(parts)).digest()


def read_files(config: RunConfig, files: Sequence[str], special_tokens: bool = True) -> list[Document]:
    """Every text file as a document, in order.

    Args:
        special_tokens: with those that the tokenizer adds by itself: what transformers' ``tokenizer(text)`` gives.

    Raises:
        InputError: no file, fewer than two tokens (nothing to predict), or more than ``max_length`` where that is
            given, or than the model has positions.
        ConfigError, CheckpointError: no model, or none with a tokenizer.
    """
    if not files:
        raise InputError("no documents: give --text FILE… or --documents FILE.jsonl")
    Checkpoint.open(config.checkpoint)
    tokenizer = load_tokenizer(config.checkpoint)
    limit, documents = _Limit(config), list[Document]()
    for file, text in zip(files, read_text(files), strict=True):

        def check(count: int, file: str = file) -> None:
            limit.check(file, count)

        tokens = tokenized(plain(tokenizer, special_tokens), text, file, check)
        if len(tokens) < 2:
            raise InputError(f"{file} has {len(tokens)} token(s); at least 2 are needed to predict one from another")
        documents.append(Document(file, len(documents), _tensor(tokens)))
    return documents


def read_json_lines(config: RunConfig, path: str, special_tokens: bool = True) -> list[Document]:
    """Every line as a document, in order. One that is too long says so; all else that is wrong is refused.

    Args:
        special_tokens: as in ``read_files``, for texts.

    Raises:
        InputError: bad lines, by their numbers. ConfigError, CheckpointError: no model, or none with a tokenizer.
    """
    lines = read_lines(path)
    Checkpoint.open(config.checkpoint)
    # Token ids need no tokenizer, which a checkpoint may not have.
    tokenizer = load_tokenizer(config.checkpoint) if any(line.form != "input_ids" for line in lines) else None
    reader = _Reader(config, tokenizer, special_tokens)
    return of_lines(path, lines, reader.document, lambda line: line.number)


def sized(config: RunConfig, documents: Sequence[Document]) -> RunConfig:
    """``config`` with the length of ``documents`` as the workload's, and their number where none is given."""
    work = config.workload
    number = work.batch_size if "batch_size" in work.model_fields_set else len(documents)
    return RunConfig.load(config, batch_size=number, max_length=max(1, *map(len, documents)))


class _Limit:
    """What limits a document's tokens."""

    def __init__(self, config: RunConfig) -> None:
        limit: int | None = config.workload.max_length
        if "max_length" in config.workload.model_fields_set:
            self._name, self._limit, self._advice = "max_length", limit, "; raise --max-length"
        else:
            limit = model_dims(read_config(config.checkpoint)).max_positions
            self._name, self._limit, self._advice = "the model's max_position_embeddings", limit, ""

    def check(self, name: str, count: int) -> None:
        if self._limit is not None and count > self._limit:
            raise InputError(f"{name} has {count} tokens, more than {self._name}={self._limit}{self._advice}")


class _Reader:
    """Lines as documents."""

    def __init__(self, config: RunConfig, tokenizer: Any, special_tokens: bool) -> None:
        self._tokenizer, self._limit, self._special_tokens = tokenizer, _Limit(config), special_tokens
        self._vocabulary = model_dims(read_config(config.checkpoint)).vocab_size

    def document(self, line: Line) -> Document:
        over = list[int]()

        def check(count: int) -> None:
            over.append(count)
            self._limit.check("it", count)
            over.pop()

        try:
            ids, targets = self._tokens(line, check)
        except InputError as error:
            if not over:
                raise
            return Document(line.id, line.index, _tensor([]), too_long=str(error))
        return Document(line.id, line.index, _tensor(ids), None if targets is None else _tensor(targets))

    def _tokens(self, line: Line, check: Callable[[int], None]) -> tuple[list[int], list[Any] | None]:
        """(token ids, targets or None); ``check`` refuses a number of tokens that is too large."""
        if line.form == "text":
            tokenize = plain(self._tokenizer, self._special_tokens)
            return tokenized(tokenize, line.content, "its text", check), None
        if line.form == "messages":
            ids, counted = conversation(self._tokenizer, line.content)
            check(len(ids))
            return ids, next_targets(ids, counted, UNSCORED)
        check(len(line.content))
        for name, given in (("input_ids", line.content), ("target_ids", line.target_ids or [])):
            flat = [i for each in given for i in each] if given and isinstance(given[0], list) else given
            if (largest := max(flat, default=0)) >= self._vocabulary:
                raise InputError(f"{name} have {largest}, outside the vocabulary of {self._vocabulary}")
        return line.content, line.target_ids


def _tensor(ids: list[Any]) -> Tensor:
    return torch.tensor(ids, dtype=torch.int32)
