"""What a launched command can refuse before any rank is started: seconds sooner, and without a line of the launcher's.

Ranks check the same things again, for those that another launcher starts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ds_ring.config import RunConfig
from ds_ring.errors import InputError
from ds_ring.planning.validation import check_axes
from ds_ring.utils.text_file import read_text_file


def check_texts(files: Iterable[str]) -> None:
    """Raise InputError for a file that cannot be read as text. What is no regular file is only looked for."""
    for file in files:
        # A FIFO gives its text once, to the ranks.
        if not os.path.exists(file) or os.path.isfile(file) or os.path.isdir(file):
            read_text_file(file)


def check_checkpoint(config: RunConfig) -> None:
    """Raise ConfigError or CheckpointError where there is no checkpoint at all."""
    if not os.path.isfile(Path(config.checkpoint, "config.json")):
        from ds_ring.hf.checkpoint import Checkpoint  # imports what takes a second

        Checkpoint.open(config.checkpoint)


def check_degrees(config: RunConfig, ranks: int | None) -> None:
    """Raise ConfigError where the layout has another number of ranks than are started. ``ranks`` None: not known."""
    if ranks is not None and not config.parallel.auto:
        check_axes(config, ranks)


def check_read_once(files: Iterable[str], ranks: int | None) -> None:
    """Raise InputError for a pipe or terminal that several ranks would read. ``ranks`` None: those of this launch, if
    this is a rank."""
    ranks = ranks or int(os.environ.get("WORLD_SIZE", "1"))
    for file in files:
        if ranks > 1 and os.path.exists(file) and not (os.path.isfile(file) or os.path.isdir(file)):
            raise InputError(
                f"{file} is no regular file: it gives its text once, and {ranks} ranks would read it; write the text "
                f"to a file"
            )
