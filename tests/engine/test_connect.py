"""How long the ranks of a launch wait for one another."""

from ds_ring.engine.connect import _group_timeout


def test_process_groups_wait_for_longer_than_the_watch():
    assert _group_timeout(1800).total_seconds() > 1800 + 10
    assert 2**31 > 1e3 * _group_timeout(0).total_seconds() == 1e3 * _group_timeout(2**62).total_seconds()
