"""What stands where a file is expected."""

from __future__ import annotations

import os
from pathlib import Path


def not_a_file(path: Path) -> str | None:
    """Why there is no file at ``path`` though the name is taken, in words that follow its name; None: there is a file,
    or nothing."""
    if path.is_file() or not os.path.lexists(path):
        return None
    if path.is_symlink() and not path.exists():
        return f"is a link to {os.readlink(path)}, where there is no file"
    return "is a folder where a file is expected" if path.is_dir() else "is no regular file"
