"""A text of the user's, read from its file."""

from __future__ import annotations

from pathlib import Path

from ds_ring.errors import InputError


def read_text_file(path: str) -> str:
    """The text of a file.

    Raises:
        InputError: it is missing, is not UTF-8 or is empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not text.strip():
        raise InputError(f"{path} is empty")
    return text
