"""What is written is JSON by its standard: numbers that are not finite are refused where they stand."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import pytest

from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError, NumericsError
from ds_ring.utils import results, strict_json

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"rows": [{"tps": 1.0}, {"tps": math.nan}]}, "rows[1].tps is nan, which is no result and no JSON"),
        ({"a": {"b": (1, -math.inf)}}, "a.b[1] is -inf, which is no result and no JSON"),
        (math.inf, "the result is inf, which is no result and no JSON"),
    ],
)
def test_a_number_that_is_not_finite_is_refused_with_its_place(document, message):
    with pytest.raises(NumericsError) as error:
        strict_json.dumps(document)
    assert str(error.value) == message


def test_everything_else_is_as_json_has_it():
    document = {"a": [1, 2.5, None, True, "ü"], "b": {"c": 1e308}}
    assert strict_json.dumps(document, indent=1) == json.dumps(document, indent=1)
    assert strict_json.dumps("ü", ensure_ascii=False) == '"ü"'
    assert strict_json.dumps({"a": Path("b")}, default=str) == '{"a": "b"}'


def test_a_result_file_is_not_replaced_by_one_that_is_not_json(tmp_path):
    file = tmp_path / "found.json"
    results.write_json(file, {"tps": 1.0})
    with pytest.raises(NumericsError, match=r"^tps is nan"):
        results.write_json(file, {"tps": math.nan})
    assert results.read_json(file) == {"tps": 1.0}
    assert [f.name for f in tmp_path.iterdir()] == ["found.json"]


@pytest.mark.parametrize(("number", "value"), [("NaN", "nan"), ("1e999", "inf")])
def test_a_configuration_with_such_a_number_is_refused(tmp_path, number, value):
    file = tmp_path / "run.json"
    file.write_text(f'{{"zero": {{"rate": [{number}]}}}}')
    with pytest.raises(ConfigError) as error:
        RunConfig.load(file)
    assert str(error.value) == f"zero.rate[0]={value} is not a finite number, as JSON has them"


def test_nothing_else_writes_documents():
    writers = {
        str(file.relative_to(ROOT))
        for folder in ("ds_ring", "benchmarks", "launch")
        for file in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("dump", "dumps", "JSONEncoder", "model_dump_json")
        if isinstance(node.value, ast.Name) and node.value.id != "strict_json"
    }
    # What ranks send to each other is no document: it may be NaN, and only they read it.
    between_ranks = {f"ds_ring/{name}.py" for name in ("process/heartbeat", "process/heartbeat_peer", "transport/wire")}
    assert writers == {"ds_ring/utils/strict_json.py", *between_ranks}
