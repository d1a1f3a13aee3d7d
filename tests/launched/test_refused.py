"""What is refused on every rank before ranks meet: in one line, with exit code 2."""

import json
import re
import shutil

import pytest

from tests.helpers.launching import in_one_start

pytestmark = pytest.mark.launch

BAD = {
    "world": (
        ["--ring-degree", 3],
        "ring_degree=3 x ulysses_degree=1 x tp_size=1 = 3 ranks, but 2 were launched",
    ),
    "batch": (
        ["--dp-size", 2, "--batch-size", 1],
        "batch_size=1 leaves some of dp_size=2 replicas without a sequence",
    ),
}

UNLIKE = """
import argparse, json, os, shutil, sys, torch, ds_ring
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from ds_ring import api
from ds_ring.cli import options
from ds_ring.config import RunConfig
from ds_ring.errors import UserError

rank = int(os.environ["RANK"])
os.chdir(Path(sys.argv.pop()) / str(rank))
run = RunConfig.load({"dtype": "fp32"}, ring_degree=2)

def refusal(build, *args, **options):
    try:
        build(*args, config=run, **options)
    except UserError as error:
        return f"{type(error).__name__}: {error}"

def theta(value):
    file = Path("llama/config.json")
    config = json.loads(file.read_text())
    config["rope_parameters"]["rope_theta"] = value
    file.write_text(json.dumps(config))

def work(args):
    shutil.copytree("llama", "cut")
    tensors = load_file("cut/model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, "cut/model.safetensors", {"format": "pt"})
    check_fit, api.check_fit = api.check_fit, lambda *_: None  # as if the file were cut after it was checked
    found = [refusal(ds_ring.from_pretrained, "cut", ring_degree=1, pp_size=2)]
    api.check_fit = check_fit
    model = AutoModelForCausalLM.from_pretrained("llama", dtype=torch.float32)
    model.lm_head.weight.data[0, 0] += rank
    found.append(refusal(ds_ring.init_inference, model))
    theta(5e5 if rank else 1e4)
    found.append(refusal(ds_ring.from_pretrained, "llama"))
    theta(1e4)
    with open("llama/model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([rank]))
    found.append(refusal(ds_ring.from_pretrained, "llama"))
    sys.stdout.write(json.dumps(found) + "\\n")
    sys.stdout.flush()
    ds_ring.from_pretrained("llama", config=run, ring_impl="contiguous" if rank else "zigzag")

options.main(work, argparse.ArgumentParser())
"""


@pytest.fixture(scope="module")
def folders(llama, tmp_path_factory):
    """One for each rank, with a checkpoint of its own, as each host has in a launch of several."""
    parent = tmp_path_factory.mktemp("folders")
    for rank in (0, 1):
        shutil.copytree(llama, parent / str(rank) / "llama")
    return parent


@pytest.fixture(scope="module")
def refused(neox, folders, tmp_path_factory):
    """What two ranks say of each configuration of ``BAD``, and to ``UNLIKE``."""
    folder = tmp_path_factory.mktemp("refused")
    (folder / "unlike.py").write_text(UNLIKE)
    bad = [["launch/bench.py", "--model", neox, "--dtype", "fp32", *options] for options, _ in BAD.values()]
    found = in_one_start(2, [*bad, [folder / "unlike.py", folders]], folder / "said")
    assert all(done.codes == [2, 2] for done in found), found
    return dict(zip((*BAD, "unlike"), found, strict=True))


@pytest.mark.parametrize("name", BAD)
def test_bad_configurations_are_refused_in_one_line_with_exit_code_2(name, refused):
    """All rules: tests/planning/test_validation.py."""
    done = refused[name]
    assert BAD[name][1] in done.stderr
    assert "Traceback" not in done.stderr
    assert "{" not in done.stdout


def test_what_one_rank_refuses_or_has_unlike_others_all_refuse_with_exit_code_2(refused, folders):
    """Each rank reads the checkpoint ``llama`` of its own folder. Of ``cut`` the last pipeline stage misses its
    head."""
    done = refused["unlike"]
    (cut, *unlike), (own_cut, *other) = (
        json.loads(re.findall(r"^\[\".*\]$", said, re.MULTILINE)[-1]) for said in done.stdouts
    )
    lacks = "cut lacks lm_head.weight"
    assert {cut, own_cut} == {f"CheckpointError: {lacks}", f"CheckpointError: rank 1: {lacks}"}
    assert other == unlike
    parameter, field, file = (text.removeprefix("DisagreementError: ") for text in unlike)
    shape = r"\(300, 72\) torch.float32 with digest \w+"
    assert re.match(rf"ranks disagree on the model's tensor lm_head.weight: rank 0 has {shape}, rank 1 has ", parameter)
    assert "the model's rope_parameters.rope_theta: rank 0 has 10000.0, rank 1 has 500000.0; make it" in field
    size = (folders / "0/llama/model.safetensors").stat().st_size
    assert re.search(rf"the checkpoint's model.safetensors: rank 0 has {size} bytes with digest \w+, rank 1", file)
    assert "error: ranks disagree on ds_ring.parallel.ring_impl: rank 0 has zigzag, rank 1 has contig" in done.stderr
    assert "Traceback" not in done.stderr
