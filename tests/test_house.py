"""Files stay short and about one thing, and no test depends on another."""

import ast
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_LINES = 350
SOURCES = sorted([*ROOT.glob("ds_ring/**/*.py"), *ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("launch/*.py")])
TESTS = sorted(ROOT.glob("tests/**/*.py"))


def lines(file: Path) -> int:
    return len(file.read_text().splitlines())


def test_sources_are_short():
    counts = {str(file.relative_to(ROOT)): lines(file) for file in SOURCES}
    assert len(counts) > 100
    assert {name: count for name, count in counts.items() if count > MOST_LINES} == {}
    assert statistics.median(count for count in counts.values() if count > 1) <= 120


def test_tests_are_short_but_for_two():
    assert len([file.name for file in TESTS if lines(file) > MOST_LINES]) <= 2


def test_few_modules_are_in_no_package():
    assert len(list((ROOT / "ds_ring").glob("*.py"))) <= 8


@pytest.mark.parametrize("folder", sorted({file.parent.relative_to(ROOT) for file in TESTS}), ids=str)
def test_no_test_module_is_imported(folder):
    """What several need is in ``tests/helpers/``."""
    found = []
    for file in (ROOT / folder).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [(file.name, name) for name in names if name.rpartition(".")[2].startswith("test_")]
    assert found == []
