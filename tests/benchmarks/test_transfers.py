"""What transfers cost the products beside them: what is moved, and on two GPUs that it moves."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from benchmarks.kernels import transfers
from benchmarks.kernels.transfers import NOTHING, Traffic
from benchmarks.reports.kernel_tables import transfers_table
from ds_ring.hf.dims import model_dims
from ds_ring.process.launcher import ROOT
from ds_ring.utils.model_config import read_config
from tests.helpers.limits import HANG_S

PAPER = ROOT / "ds_configs/models/paper.json"


@pytest.mark.parametrize("traffic", transfers.traffics(64, 48), ids=lambda t: t.name)
def test_rows_have_gaps_and_as_many_bytes_as_the_traffic(traffic: Traffic):
    largest = max(t.nbytes for t in transfers.traffics(64, 48))
    part = traffic.part(memory := torch.zeros(2 * largest, dtype=torch.uint8))
    part.fill_(1)
    assert memory.sum() == part.numel() == traffic.nbytes
    if traffic.nbytes > traffic.row_nbytes:
        assert part.stride() == (2 * traffic.row_nbytes, 1)


def test_figures_that_a_driver_does_not_give_are_dashes():
    rows = [
        {"phase": "warming", "second": 3, "traffic": "nothing", "nbytes": 0, "transfer_ms": 0.0, "layer_ms": 23.5},
        {
            "phase": "back", "traffic": "64 bytes", "nbytes": 64, "transfer_ms": 0.01, "layer_ms": 23.5,
            "energy_j": 16.5, "link_awake": 0.25,
        },
    ]  # fmt: skip
    cells = {column.header: list(column.cells) for column in transfers_table(rows).columns}
    assert cells["J a layer"] == ["-", "16.50"]
    assert cells["awake"] == ["-", "25%"]


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are two GPUs")
def test_without_two_gpus_it_is_refused_in_a_line():
    command = [sys.executable, "launch/bench_transfers.py", "--model", str(PAPER)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip().splitlines()[-1] == (
        f"error: {torch.cuda.device_count()} CUDA GPUs, 2 are wanted; they must reach each other's memory"
    )


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs; run make test-gpu where there are")
def test_every_traffic_is_timed_on_two_gpus_and_bytes_move():
    shape, devices = model_dims(read_config(PAPER)), [torch.device("cuda", index) for index in range(2)]
    rows = list(transfers.run(shape, 256, torch.float16, devices, seconds=0.2, warm_s=1, say=lambda _: None))
    count = len(transfers.traffics(1, 1))
    assert [row["phase"] for row in rows] == ["warming"] + count * ["there"] + count * ["back"]
    assert rows[1]["traffic"] == rows[-1]["traffic"] == NOTHING.name
    bandwidths = [row["nbytes"] / row["transfer_ms"] / 1e6 for row in rows if row["traffic"] == "keys and values"]
    assert all(10 < gb_per_s < 1000 for gb_per_s in bandwidths)
