"""Where the files of a checkpoint are: a directory of the user's, or a snapshot in the hub's local cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

CONFIG = "config.json"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def local_checkpoint(name: str | Path) -> Path:
    """The directory that ``name`` means, by the rules of transformers' ``from_pretrained`` with ``local_files_only``.

    A path, in which ``~`` is expanded, comes before a hub id ``owner/name``, whose snapshot is looked up in the cache
    that ``HF_HOME`` or ``HF_HUB_CACHE`` name. Nothing is downloaded. What is neither is returned as a path.
    """
    path = Path(os.path.expanduser(name))
    if os.path.exists(path) or not HUB_ID.fullmatch(str(name)):
        return path
    from huggingface_hub import try_to_load_from_cache  # a wrong configuration is refused without it

    try:
        cached = try_to_load_from_cache(str(name), CONFIG)
    except ValueError:  # huggingface_hub has more rules: no id after all
        return path
    return Path(cached).parent if isinstance(cached, str) else path
