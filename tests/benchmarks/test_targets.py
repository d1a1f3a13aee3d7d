"""Targets against measured figures."""

import pytest

from benchmarks.reports.manifest import Target
from benchmarks.reports.targets import evaluate


def test_the_worst_of_several_rows_counts():
    rows = [{"impl": "ours", "error": 1e-4}, {"impl": "ours", "error": 3e-4}, {"impl": "other", "error": 1.0}]
    most = Target(what="", figure="error", of={"impl": "ours"}, at_most=2e-4)
    assert evaluate(most, rows).measured == 3e-4
    assert evaluate(most, rows).met is False
    assert evaluate(Target(what="", figure="error", of={"impl": "ours"}, at_least=1e-5), rows).measured == 1e-4


def test_a_target_has_one_side():
    with pytest.raises(ValueError, match="either at_least or at_most"):
        Target(what="", figure="x", of={})
    with pytest.raises(ValueError, match="either at_least or at_most"):
        Target(what="", figure="x", of={}, at_least=1, at_most=2)
