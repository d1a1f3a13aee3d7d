"""The attention benchmark's arithmetic; the benchmark itself needs a GPU."""

import itertools

import pytest

from ds_ring.bench_attention import Case, default_cases
from ds_ring.report import attention_table


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 8), (1, 4)])
@pytest.mark.parametrize("causal", [True, False])
def test_flops_count_every_visible_pair_once(queries, keys, causal):
    case = Case(head_dim=16, causal=causal, batch=2, heads=3, kv_heads=1, seq_q=queries, seq_k=keys)
    pairs = itertools.product(range(queries), range(keys))
    visible = sum(1 for i, j in pairs if not causal or j <= i + keys - queries)
    assert case.flops == 4 * 2 * 3 * 16 * visible


def test_the_cases_differ_and_do_equal_work_a_token_at_every_head_size():
    cases = default_cases()
    assert len(set(cases)) == len(cases)
    assert {case.heads * case.head_dim for case in cases} == {8192}


def test_the_table_has_a_row_for_each_result():
    case = vars(Case(512, True, 2, 16, 16, 100, 100))
    row = {"impl": "ds_ring", **case, "ms": 1.0, "tflops": 2.0, "share": 0.5, "rel_error": 1e-4}
    assert attention_table([row, row]).row_count == 2
