"""What is no directory, and what the hub takes for no id, stays a path."""

import sys
from pathlib import Path

import pytest

from ds_ring.config import RunConfig
from ds_ring.utils.hub import local_checkpoint


@pytest.mark.parametrize(
    "name", ["./missing", "../missing", "runs/a..b", "results/my--run", "ckpt-", "x.git", "a/b/c", "nobody/nothing"]
)
def test_a_name_that_is_not_there_is_a_path(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert local_checkpoint(name) == Path(name)
    RunConfig.load({}, model=name)


def test_without_a_model_the_hub_is_not_asked(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert RunConfig.load({}).dtype == "fp32"


class TestWhereACheckpointIs:
    """A path, with ``~`` expanded, before a hub id in the local cache."""

    @pytest.fixture
    def cache(self, tmp_path, monkeypatch):
        """The hub's cache with one model in it, as ``hf download`` leaves it."""
        model, commit = tmp_path / "hub/models--owner--model", "0" * 40
        (model / "refs").mkdir(parents=True)
        (model / "refs/main").write_text(commit)
        (model / "snapshots" / commit).mkdir(parents=True)
        (model / "snapshots" / commit / "config.json").write_text('{"dtype": "bfloat16"}')
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        return model / "snapshots" / commit

    def test_a_hub_id_is_its_snapshot_in_the_cache(self, cache):
        config = RunConfig.load({}, model="owner/model")
        assert (config.checkpoint, config.dtype) == (str(cache), "bf16")

    def test_a_directory_comes_first(self, cache, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "owner/model").mkdir(parents=True)
        assert RunConfig.load({}, model="owner/model").checkpoint == "owner/model"

    def test_home_is_expanded(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        assert RunConfig.load({}, model="~/model").checkpoint == str(tmp_path / "model")

    @pytest.mark.parametrize("name", ["owner/other", "../owner/model", "owner/model/more", "a b", ""])
    def test_what_is_neither_stays_a_path(self, cache, name):
        assert RunConfig.load({}, model=name).checkpoint == str(Path(name))
