"""Whether this rank was given the arguments that the launcher was given.

With several hosts DeepSpeed's launcher passes a script's arguments through pdsh and ssh to a shell on each host, quoted
by half: ``$(…)``, ``;`` and quotes in a prompt are evaluated there. A rank on the launcher's host can tell, since Linux
shows both command lines. ``ds-ring`` with ``--hostfile`` passes them encoded, see ``encode``.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Mapping, Sequence

from ds_ring.errors import ConfigError
from ds_ring.process.launch_tree import find_pdsh
from ds_ring.process.processes import command_of, parent_of
from ds_ring.utils import strict_json

LONGEST = 100_000
"""Letters of an encoded argument; Linux takes 131,072 in one, and pdsh puts all of a command into one."""
PASSED_ON = ("DS_", "OMP_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "TORCH_", "PYTORCH_", "NCCL_", "GLOO_", "TRITON_")
"""Beginnings of the environment variables that are passed on to other hosts."""
SECRETS = ("HF_TOKEN",)
"""Not passed on: everybody on a host can read its command lines, and nothing is fetched from a hub."""


def check_arguments() -> None:
    """Raise ConfigError where pdsh's shells made something else of the arguments. On the launcher's host alone."""
    pdsh = find_pdsh()
    given = command_of(parent_of(pdsh) or 0) if pdsh is not None else []
    own = [word for word in command_of(os.getpid()) if not word.startswith("--local_rank=")]
    if given and (lost := changed(given, own)) is not None:
        raise ConfigError(
            f"a shell on the way changed the argument {lost!r}: DeepSpeed's launcher passes arguments to other hosts "
            f"unquoted; use ds-ring with --hostfile, or --prompt-file"
        )


def changed(given: Sequence[str], own: Sequence[str]) -> str | None:
    """The last of the launcher's words that this rank's command line does not end with; None where all are there.

    ``own`` begins with an interpreter and its options, ``given`` with the launcher and its own.
    """
    script = next((i for i, word in enumerate(own) if i and not word.startswith("-")), len(own))
    arguments = own[script + 1 :]
    # Where the script begins among the launcher's words is for its parser to say; what it has to end with is known.
    for back in range(1, len(given) + 1):
        word = given[-back]
        if back > len(arguments):
            return None if script < len(own) and word == own[script] else word
        if word != arguments[-back]:
            return word
    return None


def encode(module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """A command as letters that no shell evaluates: a module, its arguments and what it needs of the environment.

    Raises:
        ConfigError: too long for a command line.
    """
    kept = {name: value for name, value in environment.items() if name.startswith(PASSED_ON) and name not in SECRETS}
    text = strict_json.dumps({"module": module, "arguments": list(arguments), "environment": kept})
    encoded = base64.urlsafe_b64encode(zlib.compress(text.encode())).decode().rstrip("=")
    if len(encoded) > LONGEST:
        raise ConfigError(
            f"the arguments take {len(encoded)} letters on their way to other hosts, and {LONGEST} is the most; give "
            f"long prompts by --prompt-file"
        )
    return encoded


def decode(encoded: str) -> tuple[str, list[str], dict[str, str]]:
    """(module, arguments, environment) of ``encode``."""
    text = zlib.decompress(base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)))
    told = json.loads(text)
    return told["module"], told["arguments"], told["environment"]
