"""A layer's matrix products, whole and in panels: the cases, and that panels compute the same."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import gelu

from benchmarks.kernels import products
from ds_ring.hf.dims import model_dims
from ds_ring.hf.flops import layer_parameters
from ds_ring.process.launcher import ROOT
from ds_ring.utils.model_config import read_config
from tests.helpers.limits import HANG_S
from tests.helpers.marks import ON_A_GPU

PAPER = ROOT / "ds_configs/models/paper.json"


def test_the_cases_are_all_products_of_a_layer():
    config = read_config(PAPER)
    found = [case for case in products.cases(model_dims(config)) if case.name != "attention's result"]
    assert sum(case.flops(10) for case in found) == 2 * 10 * layer_parameters(config)[0]


@pytest.mark.parametrize("panel", [3, 4, 7, 8])
@pytest.mark.parametrize("case", products.cases(model_dims(read_config(PAPER))), ids=lambda case: case.name)
def test_panels_of_rows_are_the_product(case, panel):
    small = dataclasses.replace(case, columns_in=16, columns_out=24)
    x, weight, bias, residual = products.tensors(small, 7, torch.float32, torch.device("cpu"))
    out = torch.full_like(residual, torch.nan)
    products.in_panels(small, panel, x, weight, bias, residual, out)()
    want = x.double() @ weight.double().T + bias.double()
    want = gelu(want) if case.gelu else want  # on GPUs the same call takes the tanh approximation
    torch.testing.assert_close(out.double(), want + (residual if case.added else 0), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused_in_a_line():
    command = [sys.executable, "launch/bench_products.py", "--model", str(PAPER), "--panels", "1280"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip().splitlines()[-1] == "error: no CUDA GPU; this benchmark needs one"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_A_GPU)])
def test_rows_of_the_whole_product_and_of_panels(device):
    case = products.Case("down", 512, 1024, added=True)
    dtype, seconds = (torch.float32, 0.01) if device == "cpu" else (torch.float16, 0.1)
    rows = products.run([case], 256, (100, 256), dtype, torch.device(device), seconds, lambda text: None)
    whole, panels = rows
    assert [whole["impl"], panels["impl"]] == ["PyTorch", "PyTorch, 100 rows at a time"]
    assert panels["rel_error"] < 2e-3
    assert panels["over_pytorch"] == pytest.approx(whole["ms"] / panels["ms"])
