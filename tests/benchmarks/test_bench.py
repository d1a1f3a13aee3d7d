"""A benchmark's passes, timed and untimed, its figures, and how much of a large batch is on the device."""

import contextlib
import itertools
import threading
from types import SimpleNamespace

import pytest

from benchmarks.layouts import bench, timing
from benchmarks.layouts.timing import time_passes
from ds_ring.config import RunConfig
from ds_ring.engine import sequence_parallel, tensor_pipeline
from ds_ring.engine.model_runner import ModelRunner
from ds_ring.hf.dims import model_dims
from ds_ring.planning.validation import check_run
from ds_ring.process.launcher import ROOT
from ds_ring.utils.corpus import text_windows
from ds_ring.utils.model_config import read_config
from tests.helpers.mocked_world import serve
from tests.helpers.tiny_models import build, gpt_neox

BATCH, LENGTH = 1024, 8


@pytest.mark.parametrize(
    ("workload", "rows"),
    [
        ({"batch_size": 32, "micro_batch_size": 2, "ring_degree": 2}, 32),
        ({"batch_size": 1024, "micro_batch_size": 2, "ring_degree": 2}, 32),
        ({"batch_size": 1024, "micro_batch_size": 2, "dp_size": 2}, 64),
        ({"batch_size": 1024, "micro_batch_size": 2, "warmup_batch_size": 8}, 8),
        ({"batch_size": 1024, "micro_batch_size": 2, "warmup_batch_size": 7}, 8),
        ({"batch_size": 1024, "micro_batch_size": 2, "warmup_batch_size": 5000}, 1024),
        # A last micro-batch of another size, or replicas of other sizes: its kernels would be new to the timed passes.
        ({"batch_size": 1023, "micro_batch_size": 2}, 1023),
        ({"batch_size": 1022, "micro_batch_size": 2, "dp_size": 2}, 1022),
        ({"batch_size": 1, "micro_batch_size": 1}, 1),
    ],
    ids=str,
)
def test_untimed_passes_take_whole_micro_batches_of_every_replica(workload, rows):
    assert bench.warmup_sequences(RunConfig.load({}, **workload)) == rows


@pytest.mark.parametrize("file", sorted((ROOT / "ds_configs").glob("gpu*/*.json")), ids=lambda file: file.stem)
def test_every_gpu_layout_runs_the_papers_whole_pass(file):
    run = RunConfig.load(file, batch_size=1024)
    check_run(run, model_dims(read_config(ROOT / "ds_configs/models/paper.json")), run.topology.world_size)
    assert run.workload.max_length == 10000
    assert bench.warmup_sequences(run) <= 32 * run.parallel.dp_size


@pytest.mark.parametrize(
    "layout",
    [{"ring_degree": 2}, {"dp_size": 2}, {"pp_size": 2}, {"tp_size": 2}],
    ids=lambda layout: next(iter(layout)),
)
def test_no_more_than_a_micro_batch_reaches_the_device(layout, monkeypatch):
    model = build(gpt_neox(heads=2, layers=2))
    ids = text_windows(bench.torch.arange(64), BATCH, LENGTH)
    sizes = []
    for module in (sequence_parallel, tensor_pipeline):
        plain = module.to_device
        monkeypatch.setattr(
            module, "to_device", lambda t, device, plain=plain: sizes.append(t.numel()) or plain(t, device)
        )

    def work(engine):
        return [
            shard.logits_BkV for shard in engine.prefill(bench.pack(ids, None, None, engine.runner.dims)[0], "last")
        ]

    kept = serve(model, work, batch_size=BATCH, micro_batch_size=64, max_length=LENGTH, **layout)
    assert max(sizes) == 64 * LENGTH
    for logits in kept:
        assert all(part is None or part.shape[:2] in ((64, 0), (64, 1)) for part in logits)


def test_passes_go_on_for_as_long_as_is_asked_on_all_ranks_alike(monkeypatch):
    """By the clock of rank 0, where a pass takes 0.02 s; on rank 1 it takes less."""
    clock = threading.local()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def work(engine):
        clock.now = 0.0

        def step():
            clock.now += 0.02 if engine.mesh.rank == 0 else 0.001
            passes.append(engine.mesh.rank)

        passes = []
        few, many = (time_passes(engine, step, 2, sustain_s) for sustain_s in (0, 0.19))
        return few.samples_s, many.samples_s, len(passes)

    found = serve(build(gpt_neox(heads=2, layers=2)), work, ring_degree=2)
    assert found[0] == found[1]
    few, many, passes = found[0]
    assert few == pytest.approx([0.02] * 2)
    assert many == pytest.approx([0.02] * 10)
    assert passes == 2 + 10


def test_the_peak_of_memory_is_that_of_the_timed_passes(monkeypatch):
    model, muted = build(gpt_neox(heads=2, layers=2)), set()
    # Fullest is the last rank, and both hold more once they have been muted.
    held = property(lambda runner: 1.0 + runner.mesh.rank + 10.0 * (runner in muted))
    monkeypatch.setattr(ModelRunner, "peak_memory_gib", held)

    mute = bench.muted
    monkeypatch.setattr(bench, "muted", lambda engine: muted.add(engine.runner) or mute(engine))

    def work(engine):
        batch, _ = bench.pack(text_windows(bench.torch.arange(64), 4, LENGTH), None, None, engine.runner.dims)
        return bench._measure_length(engine, batch, "full", lambda text: None)

    found = serve(model, work, batch_size=4, max_length=LENGTH, ring_degree=2)
    assert len(muted) == 2
    assert [each.peak_memory_gib for each in found] == [2.0, 2.0]


def test_every_ranks_clock_is_in_the_row(monkeypatch):
    clocks, drawn = threading.local(), itertools.count(1400)

    @contextlib.contextmanager
    def watched(device):
        clocks.own = getattr(clocks, "own", None) or next(drawn)
        yield {"sm_clock_mhz": float(clocks.own), "energy_j": 6.0}

    monkeypatch.setattr(bench, "watched_gpu", watched)

    def work(engine):
        batch, _ = bench.pack(text_windows(bench.torch.arange(64), 4, LENGTH), None, None, engine.runner.dims)
        return bench._measure_length(engine, batch, "full", lambda text: None).gpu

    model = build(gpt_neox(heads=2, layers=2))
    for speed_only in (True, False):
        first, second = serve(model, work, batch_size=4, max_length=LENGTH, ring_degree=2, speed_only=speed_only)
        assert first["sm_clock_mhz_by_rank"] == second["sm_clock_mhz_by_rank"]
        assert first["sm_clock_mhz_by_rank"] == f"{first['sm_clock_mhz']:.2f} {second['sm_clock_mhz']:.2f}"
        assert first["energy_j"] == 2.0
        assert ("muted_sm_clock_mhz" in first) is not speed_only


def test_speed_alone_takes_no_passes_without_communication(monkeypatch):
    model, reports = build(gpt_neox(heads=2, layers=2)), []
    monkeypatch.setattr(bench, "muted", None)  # not to be called

    def work(engine):
        batch, _ = bench.pack(text_windows(bench.torch.arange(64), 4, LENGTH), None, None, engine.runner.dims)
        return bench._measure_length(engine, batch, "full", reports.append)

    for found in serve(model, work, batch_size=4, max_length=LENGTH, ring_degree=2, speed_only=True):
        assert len(found.step.samples_s) == 3
        assert found.bytes_sent > 0
        assert (found.step_without_comm, found.comm_alone) == (None, None)
    assert not any("without communication" in text for text in reports)
