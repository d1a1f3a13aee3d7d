"""The longest sequence that fits: the search, and real launches under a memory limit."""

import json
import sys
import time

import pytest
from transformers import GPTNeoXConfig

from benchmarks.layouts import max_length
from benchmarks.layouts.max_length import Trial, search
from ds_ring.cli import options
from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError, DsRingError, LaunchError, OutOfMemory
from ds_ring.process import launcher
from tests.helpers.launching import ROOT, last_line, run, save


class Memory:
    """Ranks whose memory is ``weights`` and so much a token, of ``size``; remembers what was tried."""

    def __init__(self, weights: float, per_token: float, size: float, told: bool = True) -> None:
        self.weights, self.per_token, self.size, self.told = weights, per_token, size, told
        self.tried: list[int] = []

    def __call__(self, length: int) -> Trial:
        self.tried.append(length)
        held = self.weights + self.per_token * length
        if held > self.size:
            return Trial(length)
        return Trial(length, 1.0, (held / 2, held), self.size if self.told else None)

    @property
    def true_limit(self) -> float:
        return (self.size - self.weights) / self.per_token


@pytest.mark.parametrize("told", [True, False], ids=["memory is known", "memory is unknown"])
@pytest.mark.parametrize("per_token", [3e-5, 7.7e-4, 0.0123])
def test_the_search_ends_at_what_fits_within_its_granularity(per_token, told):
    memory = Memory(8.0, per_token, 80.0, told)
    fits, does_not = search(memory, 1000, 1 << 30, 0.02)
    assert fits.length <= memory.true_limit < does_not.length <= 1.02 * fits.length
    assert len(set(memory.tried)) == len(memory.tried)


def test_known_memory_saves_trials():
    counts = []
    for told in (True, False):
        memory = Memory(8.0, 7.7e-5, 80.0, told)
        search(memory, 1000, 1 << 30, 0.02)
        counts.append(len(memory.tried))
    doublings = 11
    assert counts == [doublings + 2, doublings + 6]


def test_a_wrong_prediction_only_costs_trials():
    """Memory that is lost to fragments is in no rank's peak."""
    memory = Memory(8.0, 7.7e-5, 80.0)

    def attempt(length):
        found = memory(length)
        return Trial(length) if length > 0.8 * memory.true_limit else found

    fits, does_not = search(attempt, 1000, 1 << 30, 0.02)
    assert fits.length <= 0.8 * memory.true_limit < does_not.length <= 1.02 * fits.length


def test_the_models_positions_end_the_search():
    memory = Memory(0.0, 1e-9, 80.0)
    fits, does_not = search(memory, 1000, 4096, 0.02)
    assert (fits.length, does_not, memory.tried) == (4096, None, [1000, 2000, 4000, 4096])


def test_a_first_length_that_does_not_fit_is_halved():
    memory = Memory(0.0, 1.0, 100.0)
    fits, does_not = search(memory, 1000, 1 << 20, 0.001)
    assert (fits.length, does_not.length) == (100, 101)
    assert search(Memory(2.0, 1.0, 1.0), 4, 1 << 20, 0.5)[0] is None


def test_a_granularity_that_no_search_could_reach_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="granularity=0 must be above 0"):
        max_length.find(
            RunConfig.load({}), granularity=0, memory_limit_gib=None, limit_s=1, output=tmp_path / "x.json",
            provenance={}, report=print,
        )  # fmt: skip


@pytest.mark.launch
def test_launched_trials_find_what_a_limited_memory_holds(tmp_path):
    config = GPTNeoXConfig(
        hidden_size=64, num_attention_heads=8, intermediate_size=4096, num_hidden_layers=1, vocab_size=300,
        max_position_embeddings=1 << 17,
    )  # fmt: skip
    model, output = save(tmp_path / "model", config), tmp_path / "longest.json"
    script = [sys.executable, str(ROOT / "launch/longest.py"), "--model", str(model), "--dtype", "fp32"]
    options = ["--ring-degree", "2", "--max-length", "8192", "--memory-limit", "0.1", "--granularity", "1"]
    done = run([*script, *options, "--output", str(output)])
    document = last_line(done)
    assert document == json.loads(output.read_text())
    found = document["longest"]
    assert [row["fits"] for row in document["rows"]] == [False] * (len(document["rows"]) - 1) + [True]
    assert document["shortest_not_fitting"] == 2 * found["length"]
    assert found["tokens_per_second"] == pytest.approx(found["length"] / found["seconds"])
    assert len(found["peak_memory_gib"]) == 2


SCRIPT = """
import argparse, os, sys, time
from ds_ring.engine.connect import connect
from ds_ring.cli import options
from ds_ring.config import RunConfig

def work(args):
    mesh = connect(RunConfig.load({"dtype": "fp32"}, ring_degree=2))
%s

parser = argparse.ArgumentParser()
options.main(work, parser)
"""


ALONE = """
    if mesh.rank == 1:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    mesh["world"].barrier()
"""
KNOWN_TO_PEERS = """
    try:
        with mesh["world"].together():
            if mesh.rank == 1:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    finally:
        time.sleep(1.2 * mesh.rank)
"""


@pytest.mark.launch
@pytest.mark.parametrize("failing", [ALONE, KNOWN_TO_PEERS], ids=["alone", "known to peers"])
def test_one_rank_out_of_memory_ends_them_all(failing, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    (tmp_path / "script.py").write_text(SCRIPT % failing)
    with pytest.raises(
        OutOfMemory, match=r"^out of memory on rank 1: CUDA out of memory\. Tried to allocate 2\.00 GiB$"
    ):
        launcher.launch(str(tmp_path / "script.py"), 2, [], log=tmp_path / "log", report=print, limit_s=60)


def test_a_run_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(DsRingError, match=r"did not end in 1 s"):
        launcher.run(["sleep", "60"], 1, log=tmp_path / "log", report=print, limit_s=1.0)


def test_a_line_that_looks_like_a_refusal_is_none_where_the_run_succeeds(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    script = "import sys; print('error: a cache could not be read'); sys.exit(int(sys.argv[1]))"
    command = [sys.executable, "-c", script]
    launcher.run([*command, "0"], 1, log=tmp_path / "log", report=print)
    assert (tmp_path / "log").read_text() == "error: a cache could not be read\n"
    for code in ("1", "2"):
        with pytest.raises(ConfigError, match=r"^a cache could not be read$"):
            launcher.run([*command, code], 1, log=tmp_path / "log", report=print)


@pytest.mark.parametrize(("heeds", "last_words"), [(True, "interrupted"), (False, "")])
def test_who_is_late_may_write_down_what_it_has(heeds, last_words, tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "GRACE_S", 1.0)
    script = f"""
import pathlib, signal, time
signal.signal(signal.SIGTERM, signal.default_int_handler if {heeds} else signal.SIG_IGN)
try:
    time.sleep(60)
except KeyboardInterrupt:
    pathlib.Path({str(tmp_path / "said")!r}).write_text("interrupted")
"""
    begun = time.monotonic()
    with pytest.raises(LaunchError, match="did not end in 2 s"):
        launcher.run([sys.executable, "-c", script], 1, log=tmp_path / "log", report=print, limit_s=2.0)
    assert time.monotonic() - begun < 10
    said = tmp_path / "said"
    assert (said.read_text() if said.exists() else "") == last_words


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (MemoryError(), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert options.is_out_of_memory(error) is expected
