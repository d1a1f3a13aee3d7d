"""A launched rank whose memory runs out, as it loads or later, ends the run with what it said."""

import pytest

from ds_ring.errors import OutOfMemory
from ds_ring.process import launcher
from tests.helpers.limits import HANG_S
from tests.helpers.tiny_models import build, gpt_neox

pytestmark = pytest.mark.launch

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
KNOWN_TO_ALL = """
    try:
        with mesh["world"].together():
            if mesh.rank == 1:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    finally:
        time.sleep(1.2 * mesh.rank)
"""


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Runs the text of a module, with options, on two ranks."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(text, *options):
        (tmp_path / "runs_out_of_memory.py").write_text(text)
        launcher.launch("runs_out_of_memory", 2, options, log=tmp_path / "log", report=print, limit_s=HANG_S)

    return run


@pytest.mark.parametrize("failing", [ALONE, KNOWN_TO_ALL], ids=["alone", "known to all"])
def test_one_rank_out_of_memory_ends_them_all(failing, launch):
    with pytest.raises(
        OutOfMemory, match=r"^out of memory on rank 1: CUDA out of memory\. Tried to allocate 2\.00 GiB$"
    ):
        launch(SCRIPT % failing)


LOADING = """
import argparse, os, torch, ds_ring
from ds_ring.cli import options
from transformers import core_model_loading

copied = core_model_loading._materialize_copy

def out_of_memory(tensor, *args):
    if isinstance(tensor, torch.Tensor) and tensor.is_meta:  # names and shapes are checked first
        return copied(tensor, *args)
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

def work(args):
    if os.environ["RANK"] == "1":
        core_model_loading._materialize_copy = out_of_memory
    ds_ring.from_pretrained(args.model, {"dtype": "fp32"}, ring_degree=2)

parser = argparse.ArgumentParser()
parser.add_argument("--model")
options.main(work, parser)
"""


def test_one_rank_out_of_memory_as_it_loads_ends_them_all(launch, tmp_path):
    build(gpt_neox(heads=4)).save_pretrained(tmp_path / "model")
    said = (
        r"^out of memory on rank 1: CUDA out of memory\. Tried to allocate 2\.00 GiB; [\d.]+ GiB were held, 0\.0 are "
        r"predicted for this rank's weights in fp32; take dtype fp16 or bf16, or raise pp_size, .*"
    )
    with pytest.raises(OutOfMemory, match=said):
        launch(LOADING, "--model", str(tmp_path / "model"))
