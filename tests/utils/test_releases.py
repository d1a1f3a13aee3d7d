"""Releases of transformers that are refused, before anything is read."""

from pathlib import Path

import pytest

import ds_ring
from ds_ring.errors import ConfigError
from ds_ring.utils import releases


def test_bounds():
    assert releases.problem("transformers", "5.17.0") is None
    assert releases.problem("transformers", "5.23.4") is None
    assert releases.problem("transformers", "5.16.2") == (
        "5.16.2 is older than 5.17",
        "install transformers 5.17 or newer",
    )
    for new in ("5.24.0", "6.0.0"):
        wanted = (f"{new} is not supported yet", "install 'transformers>=5.17,<5.24'")
        assert releases.problem("transformers", new) == wanted
    assert releases.problem("torch", "2.13.0+cpu") is None


def test_pip_installs_what_is_supported():
    dependencies = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for name in ("torch", "transformers", "deepspeed"):
        too_new = f",<{releases.TOO_NEW[name]}" if name in releases.TOO_NEW else ""
        assert f'"{name}>={releases.OLDEST[name]}' in dependencies
        assert f'{too_new}"' in dependencies


def test_a_release_that_is_too_new_is_refused_first(monkeypatch):
    monkeypatch.setattr(releases, "version", lambda name: "5.24.0")
    with pytest.raises(
        ConfigError, match=r"transformers 5\.24\.0 is not supported yet: install 'transformers>=5\.17,<5\.24'"
    ):
        ds_ring.from_pretrained("no such directory")
