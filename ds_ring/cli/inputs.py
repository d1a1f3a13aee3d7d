"""What a launched command can refuse before any rank is started: seconds sooner, and without a line of the launcher's.

Ranks check the same things again, for those that another launcher starts.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from ds_ring.config import RunConfig
from ds_ring.errors import InputError
from ds_ring.planning.validation import check_axes


def check_texts(files: Iterable[str]) -> None:
    """Raise InputError for a file that cannot be read as text. What is no regular file is only looked for."""
    for file in files:
        try:
            if stat.S_ISREG(mode := os.stat(file).st_mode):
                text = Path(file).read_bytes()
                text.decode("utf-8")
                if not text.strip():
                    raise InputError(f"{file} is empty")
            elif stat.S_ISDIR(mode):
                raise InputError(f"cannot read {file}: Is a directory")
        except OSError as error:
            raise InputError(f"cannot read {file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def check_checkpoint(config: RunConfig) -> None:
    """Raise ConfigError or CheckpointError where there is no checkpoint at all."""
    if not os.path.isfile(Path(config.checkpoint, "config.json")):
        from ds_ring.hf.checkpoint import Checkpoint  # imports what takes a second

        Checkpoint.open(config.checkpoint)


def check_degrees(config: RunConfig, ranks: int | None) -> None:
    """Raise ConfigError where the layout has another number of ranks than are started. ``ranks`` None: not known."""
    if ranks is not None and not config.parallel.auto:
        check_axes(config, ranks)
