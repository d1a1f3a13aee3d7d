"""Git LFS leaves a small text file in place of each large file that it has not fetched."""

from __future__ import annotations

from pathlib import Path

from ds_ring.errors import CheckpointError

POINTER = b"version https://git-lfs.github.com/spec/"


def is_pointer(file: Path) -> bool:
    """Whether ``file`` is such a text. OSError where it cannot be read."""
    with file.open("rb") as opened:
        return opened.read(len(POINTER)) == POINTER


def refuse_pointer(file: Path) -> None:
    """Raise CheckpointError where ``file`` is a pointer, and OSError where it cannot be read."""
    if is_pointer(file):
        raise CheckpointError(
            f"{file} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`, or the checkpoint with "
            f"`hf download`"
        )
