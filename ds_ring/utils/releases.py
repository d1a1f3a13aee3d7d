"""Which releases of the packages underneath are supported."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version

from ds_ring.errors import ConfigError

OLDEST = {"python": "3.11", "torch": "2.11", "transformers": "5.17", "deepspeed": "0.19"}
TOO_NEW = {"transformers": "5.24"}
"""transformers 5.24 renames ``past_key_values`` to ``cache`` in all that ``generate`` calls."""


def problem(name: str, found: str) -> tuple[str, str] | None:
    """(what is wrong with this release of a package, what to do); None: it is supported."""
    release = Version(found).release
    oldest, too_new = OLDEST[name], TOO_NEW.get(name)
    if release < Version(oldest).release:
        return f"{found} is older than {oldest}", f"install {name} {oldest} or newer"
    if too_new and release >= Version(too_new).release:
        return f"{found} is not supported yet", f"install '{name}>={oldest},<{too_new}'"
    return None


def check_transformers() -> None:
    """Raise ConfigError where the installed transformers is not supported."""
    found = version("transformers")
    if wrong := problem("transformers", found):
        raise ConfigError(f"transformers {wrong[0]}: {wrong[1]}")
