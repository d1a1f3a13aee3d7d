"""docs/configuration.md is what the fields say, and its example is one."""

import json
import re
from pathlib import Path

from ds_ring.config import page
from ds_ring.config.run_config import RunConfig
from ds_ring.config.sections import BenchmarkConfig, ParallelConfig, RingConfig, WorkloadConfig

WRITTEN = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_up_to_date():
    assert WRITTEN.read_text() == page.text(), "run python -m ds_ring.config.page > docs/configuration.md"


def test_every_field_has_a_row():
    text = page.text()
    for section in (RingConfig, ParallelConfig, WorkloadConfig, BenchmarkConfig):
        for name, field in section.model_fields.items():
            if name not in page.SECTIONS:
                assert f"| `{name}` |" in text
                assert field.description


def test_the_example_is_a_configuration():
    (example,) = re.findall(r"```json\n(.*?)```", page.text(), re.DOTALL)
    assert RunConfig.load(json.loads(example)).topology.world_size == 4
