"""A layer's matrix products by cuBLASLt's algorithms: what is timed, and on a GPU that all compute the same."""

from __future__ import annotations

import ctypes
import dataclasses
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import gelu

from benchmarks.kernels import cublaslt, products
from benchmarks.reports import tables
from ds_ring.hf.dims import model_dims, read_config
from ds_ring.hf.flops import layer_parameters
from ds_ring.process.launcher import ROOT
from tests.helpers.marks import ON_A_GPU

PAPER = ROOT / "ds_configs/models/paper.json"


def test_the_cases_are_all_products_of_a_layer():
    config = read_config(PAPER)
    found = [case for case in products.cases(model_dims(config)) if case.name != "attention's result"]
    assert sum(case.flops(10) for case in found) == 2 * 10 * layer_parameters(config)[0]


def test_structures_are_as_large_as_the_librarys():
    assert ctypes.sizeof(cublaslt._Algorithm) == 64
    assert ctypes.sizeof(cublaslt._Found) == 96


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


def test_a_table_of_rows():
    row = {
        "case": "down, added", "rows": 10000, "impl": "cuBLASLt", "ms": 7.5, "tflops": 700.0, "over_pytorch": 1.02,
        "sm_clock_mhz": 1320.0, "power_w": None, "configuration": "id 1 tile 2",
    }  # fmt: skip
    table = tables.products_table([row])
    assert [next(iter(column.cells)) for column in table.columns] == [
        "down, added", "10,000", "cuBLASLt", "7.500", "700.0", "+2.0 %", "1320", "-", "id 1 tile 2"
    ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused_in_a_line():
    command = [sys.executable, "launch/bench_products.py", "--model", str(PAPER)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip().splitlines()[-1] == "error: no CUDA GPU; this benchmark needs one"


class TestOnAGPU:
    pytestmark = ON_A_GPU

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("end", ["nothing", "bias", "gelu", "added", "added in place", "bias and added"])
    def test_every_algorithm_computes_the_product(self, dtype, end):
        generator = torch.Generator("cuda").manual_seed(0)

        def random(*size):
            return torch.randn(size, generator=generator, device="cuda").to(dtype)

        x, weight, bias, added = random(300, 512), random(768, 512) / 16, random(768), random(300, 768)
        want = x.double() @ weight.double().T
        want += bias.double() if end in ("bias", "gelu", "bias and added") else 0
        want += added.double() if "added" in end else 0
        want = gelu(want, approximate="tanh") if end == "gelu" else want
        out = added.clone() if end == "added in place" else torch.empty_like(added)
        found = cublaslt.candidates(
            x, weight, out, gelu=end == "gelu",
            bias_W=bias if end in ("bias", "gelu", "bias and added") else None,
            added_MW=out if end == "added in place" else added if "added" in end else None,
        )  # fmt: skip
        assert len(found) > 3
        assert [one.rank for one in found] == sorted({one.rank for one in found})
        for candidate in found:
            out.copy_(added if end == "added in place" else torch.full_like(out, torch.nan))
            candidate.run()
            assert float((out.double() - want).norm() / want.norm()) < (1e-3 if dtype == torch.float16 else 8e-3)

    def test_rows_of_panels_alone(self):
        case, device = products.Case("down", 512, 1024, added=True), torch.device("cuda")
        rows = list(products.run([case], 256, torch.float16, device, 0.1, lambda text: None, 0, (100, 256)))
        assert [row["impl"] for row in rows] == ["PyTorch", "PyTorch, 100 rows at a time"]
        assert rows[1]["rel_error"] < 2e-3

    def test_rows_of_pytorch_and_of_finalists(self):
        case = products.Case("up", 512, 1024, gelu=True)
        first, *rest = products.run([case], 256, torch.float16, torch.device("cuda"), 0.1, lambda text: None)
        assert first["impl"] == "PyTorch"
        assert 1 <= len(rest) <= products.FINALISTS
        assert all(row["impl"] == "cuBLASLt" and row["over_pytorch"] > 0 and row["rel_error"] < 2e-3 for row in rest)
