"""The configurations that are shipped."""

import re
from pathlib import Path

import pytest

from ds_ring.config import RunConfig
from ds_ring.hf.dims import model_dims
from ds_ring.planning.validation import check_run
from ds_ring.utils.model_config import read_config

SHIPPED = Path(__file__).parents[2] / "ds_configs"
CONFIGS = sorted(file for file in SHIPPED.rglob("*.json") if file.parent.name != "models")
FOR_ONE_HOST = [file for file in CONFIGS if file.parent != SHIPPED]


def name(file: Path) -> str:
    return file.relative_to(SHIPPED).with_suffix("").as_posix()


def test_configurations_are_shipped():
    assert CONFIGS


@pytest.mark.parametrize("file", CONFIGS, ids=name)
def test_every_shipped_configuration_loads_and_documents_itself(file):
    config = RunConfig.load(file)
    assert RunConfig.load(config.document()).document() == config.document()
    model = model_dims(read_config(SHIPPED / "models" / f"{Path(config.ring.model).name}.json"))
    assert check_run(config, model, config.topology.world_size) is None


@pytest.mark.parametrize("file", FOR_ONE_HOST, ids=name)
def test_a_configuration_for_one_host_is_named_after_its_layout_and_number_of_ranks(file):
    config = RunConfig.load(file)
    assert file.stem == config.label
    assert re.fullmatch(rf"[a-z]+{config.topology.world_size}", file.parent.name)
