"""The longest sequence that fits: the search."""

import pytest

from benchmarks.layouts import max_length
from benchmarks.layouts.length_search import Attempt, search
from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError


class Memory:
    """Attempts on ranks with ``size`` of memory, which use ``weights`` and ``per_token`` for each token."""

    def __init__(self, weights: float, per_token: float, size: float, known: bool = True) -> None:
        self.weights, self.per_token, self.size, self.known = weights, per_token, size, known
        self.tried: list[int] = []

    def __call__(self, length: int) -> Attempt:
        self.tried.append(length)
        held = self.weights + self.per_token * length
        if held > self.size:
            return Attempt(length)
        return Attempt(length, 1.0, (held / 2, held), self.size if self.known else None)

    @property
    def true_limit(self) -> float:
        return (self.size - self.weights) / self.per_token


@pytest.mark.parametrize("known", [True, False], ids=["memory is known", "memory is unknown"])
@pytest.mark.parametrize("per_token", [3e-5, 7.7e-4, 0.0123])
def test_the_search_ends_at_what_fits_within_its_granularity(per_token, known):
    memory = Memory(8.0, per_token, 80.0, known)
    longest, failing = search(memory, 1000, 1 << 30, 0.02)
    assert longest.length <= memory.true_limit < failing.length <= 1.02 * longest.length
    assert len(set(memory.tried)) == len(memory.tried)


def test_known_memory_saves_attempts():
    counts = []
    for known in (True, False):
        memory = Memory(8.0, 7.7e-5, 80.0, known)
        search(memory, 1000, 1 << 30, 0.02)
        counts.append(len(memory.tried))
    doublings = 11
    assert counts == [doublings + 2, doublings + 6]


def test_a_wrong_prediction_only_costs_attempts():
    """Memory that is lost to fragments is in no rank's peak."""
    memory = Memory(8.0, 7.7e-5, 80.0)

    def attempt(length):
        found = memory(length)
        return Attempt(length) if length > 0.8 * memory.true_limit else found

    longest, failing = search(attempt, 1000, 1 << 30, 0.02)
    assert longest.length <= 0.8 * memory.true_limit < failing.length <= 1.02 * longest.length


def test_the_models_positions_end_the_search():
    memory = Memory(0.0, 1e-9, 80.0)
    longest, failing = search(memory, 1000, 4096, 0.02)
    assert (longest.length, failing, memory.tried) == (4096, None, [1000, 2000, 4000, 4096])


def test_a_first_length_that_does_not_fit_is_halved():
    memory = Memory(0.0, 1.0, 100.0)
    longest, failing = search(memory, 1000, 1 << 20, 0.001)
    assert (longest.length, failing.length) == (100, 101)
    assert search(Memory(2.0, 1.0, 1.0), 4, 1 << 20, 0.5)[0] is None


def test_a_granularity_that_no_search_could_reach_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="granularity=0 must be above 0"):
        max_length.find(
            RunConfig.load({}), granularity=0, memory_limit_gib=None, limit_s=1, output=tmp_path / "x.json",
            provenance={}, report=print,
        )  # fmt: skip
