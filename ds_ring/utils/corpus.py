"""Text as tokens: the user's files, or the Python language reference, which comes with every interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer

from ds_ring.errors import CheckpointError, in_one_line
from ds_ring.utils.config_file import CONFIG
from ds_ring.utils.lfs import refuse_pointer
from ds_ring.utils.model_config import read_config
from ds_ring.utils.text_file import read_text_file

TEXTS = {".json", ".model", ".txt", ".jinja", ".tiktoken"}
"""Endings of the files that a tokenizer may be in."""


def load_tokenizer(checkpoint: str | Path) -> Any:
    """The checkpoint's tokenizer.

    Raises:
        CheckpointError: none that transformers can read, one whose files Git LFS has not fetched, or a config that
            cannot be read.
    """
    folder = Path(checkpoint)
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.suffix in TEXTS and file.is_file():
            refuse_pointer(file)
    # Given, since transformers would read it by rules of its own.
    config = read_config(folder) if (folder / CONFIG).is_file() else None
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, config=config, trust_remote_code=False, local_files_only=True
        )
        tokenizer("text", verbose=False)  # some of its settings are looked at here only
    except Exception as error:  # files of another version or form end in errors of any kind
        raise CheckpointError(
            _unreadable(folder / "tokenizer.json")
            or f"{checkpoint} holds no tokenizer that transformers can read: {in_one_line(error)}"
        ) from None
    return tokenizer


def _unreadable(file: Path) -> str | None:
    """What is wrong with a tokenizer.json by itself, where there is one."""
    if not file.is_file():
        return None
    try:
        Tokenizer.from_file(str(file))
    except Exception as error:
        return (
            f"{file} cannot be read by tokenizers {tokenizers.__version__}: {in_one_line(error)}; it is damaged, or of "
            f"a newer version of that package"
        )
    return None


def read_text(paths: Sequence[str]) -> list[str]:
    """The text of every file; InputError as of ``read_text_file``."""
    return [read_text_file(path) for path in paths]


def default_text() -> str:
    """The Python language reference."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def token_stream(checkpoint: str | Path, paths: Sequence[str], special_tokens: bool = False) -> Tensor:
    """All tokens of the files, or of the default text, in order: [N], int64.

    ``special_tokens``: with those that the tokenizer adds by itself.
    """
    text = "\n".join(read_text(paths)) if paths else default_text()
    ids = load_tokenizer(checkpoint)(text, add_special_tokens=special_tokens, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def text_windows(stream: Tensor, batch: int, length: int) -> Tensor:
    """``batch`` windows of a token stream, [batch, length], evenly spaced over it. They wrap round at its end."""
    starts = torch.arange(batch) * max(1, len(stream) // batch)
    return stream[(starts[:, None] + torch.arange(length)) % len(stream)]
