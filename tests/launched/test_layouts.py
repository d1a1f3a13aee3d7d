"""Real processes, started by the deepspeed launcher, talking over gloo."""

import json
import math
import re
import shutil
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, LlamaConfig

from ds_ring.cli.documents import read as read_documents
from ds_ring.cli.seeded_checkpoint import make_checkpoint
from ds_ring.config import RunConfig
from ds_ring.errors import InputError
from tests.helpers.launching import ROOT, deepspeed, last_line, run, save

pytestmark = pytest.mark.launch

FIVE_DIGITS = 5e-6


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Nine query heads, three key/value heads."""
    config = LlamaConfig(
        hidden_size=72, num_attention_heads=9, num_key_value_heads=3, head_dim=8, intermediate_size=96,
        num_hidden_layers=2, vocab_size=300, max_position_embeddings=4096, initializer_range=0.3,
    )  # fmt: skip
    return save(tmp_path_factory.mktemp("llama"), config)


@pytest.fixture(scope="module")
def neox(tmp_path_factory):
    config = GPTNeoXConfig(
        hidden_size=64, num_attention_heads=8, intermediate_size=128, num_hidden_layers=4, vocab_size=300,
        use_parallel_residual=False, hidden_act="gelu_pytorch_tanh", max_position_embeddings=4096,
        initializer_range=0.3,
    )  # fmt: skip
    return save(tmp_path_factory.mktemp("neox"), config)


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Three documents of unequal, odd lengths."""
    folder = tmp_path_factory.mktemp("documents")
    text = (ROOT / "ds_ring" / "parallel" / "layout.py").read_text()
    files = []
    for i, (start, stop) in enumerate([(0, 1001), (1500, 1563), (500, 1240)]):
        files.append(folder / f"{i}.txt")
        files[-1].write_text(text[start:stop])
    return files


@pytest.fixture(scope="module")
def unsharded_perplexity(llama, documents):
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(llama)
    found = []
    for file in documents:
        ids = tokenizer(file.read_text(), return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logits = model(ids).logits[0, :-1].double()
        found.append(math.exp(torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()))
    return found


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(2, ["--ring-degree", 2]), (3, ["--ulysses-degree", 3]), (2, ["--dp-size", 2]), (2, ["--pp-size", 2])],
    ids=["ring2", "ulysses3", "dp2", "pp2"],
)
def test_score_gives_the_unsharded_perplexity_of_every_document(ranks, layout, llama, documents, unsharded_perplexity):
    done = deepspeed(ranks, "launch/score.py", "--model", llama, "--dtype", "fp32", *layout, "--text", *documents)
    result = last_line(done)["documents"]
    assert [d["file"] for d in result] == [str(f) for f in documents]
    assert [d["tokens"] for d in result] == [1001, 63, 740]
    for document, want in zip(result, unsharded_perplexity, strict=True):
        assert document["perplexity"] == pytest.approx(want, rel=FIVE_DIGITS)
        assert document["nll"] == pytest.approx(math.log(want), rel=FIVE_DIGITS)


def test_score_without_a_launcher_is_a_world_of_one(llama, documents, unsharded_perplexity):
    done = run(
        [sys.executable, "launch/score.py", "--model", str(llama), "--dtype", "fp32", "--text", str(documents[0])]
    )
    assert last_line(done)["documents"][0]["perplexity"] == pytest.approx(unsharded_perplexity[0], rel=FIVE_DIGITS)


@pytest.fixture(scope="module")
def reference(neox, tmp_path_factory):
    """The unsharded model's results, by the script that writes them."""
    output = tmp_path_factory.mktemp("reference") / "reference.safetensors"
    sizes = ["--dtype", "fp32", "--rows", "2", "--length", "1001"]
    run([sys.executable, "-m", "benchmarks.layouts.parity", "--model", str(neox), *sizes, "--output", str(output)])
    return output


@pytest.mark.parametrize(
    ("label", "layout"),
    [
        ("tp2_pp2", ["--tp-size", 2, "--pp-size", 2]),
        ("ulysses2_ring2_pass_kv", ["--ulysses-degree", 2, "--ring-degree", 2, "--ring-variant", "pass_kv"]),
        ("dp2_tp2", ["--dp-size", 2, "--tp-size", 2, "--interleave", "on"]),
    ],
)
def test_bench_measures_and_agrees_with_the_unsharded_model(label, layout, neox, reference, tmp_path):
    output = tmp_path / "bench.json"
    workload = ["--batch-size", 4, "--max-length", 1001, "--repeats", 2, "--mode", "both", "--references", reference]
    warmup = 4 if "on" in layout else 2  # two micro-batches a replica, or there would be none to be in flight with
    workload += ["--trace", tmp_path / "trace.json", "--warmup-batch-size", warmup]
    ring4, behind = tmp_path / "ring4.json", tmp_path / "behind.json"
    section = {"model": str(neox), "parallel": {"ring_degree": 4}, "workload": {"batch_size": 4, "max_length": 1001}}
    ring4.write_text(json.dumps({"dtype": "fp32", "ds_ring": section}))
    workload += ["--then", ring4, behind]
    done = deepspeed(4, "launch/bench.py", "--model", neox, "--dtype", "fp32", *layout, *workload, "--output", output)
    document = last_line(done)
    assert document == json.loads(output.read_text())
    (after,) = json.loads(behind.read_text())["rows"]
    assert (after["layout"], after["length"]) == ("ring4", 1001)
    assert after["max_rel_error"] < 1e-5
    row, short = document["rows"]
    assert [row["mode"], short["mode"]] == ["full", "prefill_only"]
    assert short["max_rel_error"] < 1e-5
    assert short["flops_per_token"] < row["flops_per_token"]
    assert short["bytes_sent_per_rank"] < row["bytes_sent_per_rank"]
    assert short["bytes_formula"] is None
    assert row["layout"] == label
    assert (row["gpus"], row["batch"], row["length"], row["dtype"]) == (4, 4, 1001, "fp32")
    assert row["max_rel_error"] < 1e-5
    assert (row["in_flight"] > 1) == ("on" in layout)
    assert row["warmup_batch"] == warmup  # whose bytes are scaled to the four rows
    assert row["bytes_sent_per_rank"] == row["bytes_formula"] > 0
    assert row["tpot_ms"] == pytest.approx(1e3 * row["batch"] / row["tps"])
    assert row["tps"] == pytest.approx(4 * 1001 / (row["step_ms"] / 1e3))
    assert 0 < row["mfu"] < 1
    assert row["trace"] == str(tmp_path / "trace.json")
    assert [len(list(tmp_path.glob(f"trace{rank}.json"))) for rank in ("", ".rank1", ".rank2", ".rank3")] == [1] * 4
    by_rank = [float(ms) for ms in row["trace_gemm_ms_by_rank"].split()]
    assert len(by_rank) == 4
    assert row["trace_gemm_ms"] == pytest.approx(sum(by_rank) / 4, abs=0.01)
    assert min(by_rank) > 0
    assert (
        0 < row["trace_transfer_exposed_ms_per_layer"] * 4 / (2 if label == "tp2_pp2" else 1) < row["trace_window_ms"]
    )
    assert "fused (plain PyTorch on cpu)" in done.stderr


def test_the_python_interface_and_slices_of_whole_weights_inside_a_launched_script(neox, tmp_path):
    """And the all-reduces of ``hf.sliced`` over gloo, in the group that would decode after a sharded prefill."""
    config = tmp_path / "run.json"
    config.write_text(
        json.dumps({"dtype": "fp32", "ds_ring": {"parallel": {"ring_degree": 2}, "workload": {"max_length": 101}}})
    )
    script = tmp_path / "script.py"
    script.write_text("""
import json, sys, torch, ds_ring
from transformers import AutoModelForCausalLM
from ds_ring.cli.options import leave
from ds_ring.hf.tensor_slices import sliced

path, config = sys.argv[1:]
ids = torch.arange(101)[None] % 300
whole, plain = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for _ in range(2))
with torch.inference_mode():
    want = whole(ids).logits
for model in (ds_ring.from_pretrained(path, config=config), ds_ring.init_inference(whole, config=config)):
    got = model(ids).logits
    assert got.shape == want.shape
    assert (got - want).norm() < 1e-5 * want.norm()
    last = model(ids, logits_to_keep=1).logits
    assert torch.equal(last, got[:, -1:]) or (last - got[:, -1:]).norm() < 1e-5 * last.norm()

mesh = model.mesh
mesh.traffic.bytes_by_op.clear()
with torch.inference_mode(), sliced(plain, mesh["sp"].rank, 2, mesh["sp"]):
    got = plain(ids).logits
sent = dict(mesh.traffic.bytes_by_op)
errors = mesh["world"].all_gather_objects(float((got - want).abs().max() / want.abs().max()))
if mesh.rank == 0:
    print(json.dumps({"errors": errors, "bytes": sent}), flush=True)
leave(0)
""")
    result = last_line(deepspeed(2, script, neox, config))
    assert len(result["errors"]) == 2
    assert max(result["errors"]) < 1e-5
    assert result["bytes"] == {"all_reduce": 4 * 2 * (101 * 64 * 4 * 2 // 2)}


def test_the_examples_of_the_pages_run(tmp_path):
    """All Python of README.md, docs/generation.md and docs/scoring.md, as it is written there."""
    checkpoint = tmp_path / "small"
    make_checkpoint(ROOT / "ds_configs/models/small.json", checkpoint, seed=0, dtype="fp32", device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    tokenizer.save_pretrained(checkpoint)
    readme, generation, scoring = (
        "".join(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL))
        for page in ("README.md", "docs/generation.md", "docs/scoring.md")
    )
    shown = "import sys; sys.stdout.write(f'{SHAPES}\\n'); sys.stdout.flush()\n"
    chat = "[inputs.input_ids.shape[1], tokens.shape[1] > inputs.input_ids.shape[1]]"
    turns = "[list(tokens.shape), answer.sequences.shape[1] > ids.shape[1]]"
    scores = "[[len(n) for n in nats], list(next_tokens.shape), list(logits.shape)]"
    script = tmp_path / "example.py"
    parts = [(readme, chat), (generation, turns), (scoring, scores)]
    script.write_text(
        "".join(code + shown.replace("SHAPES", shape) for code, shape in parts).replace("DIR", str(checkpoint))
    )
    done = deepspeed(2, script)
    prompt = len("user: What is the capital of France?\nassistant:")
    for line in (f"[{prompt}, True]", "[[2, 113], True]", "[[14, 12], [2], [2, 15, 512]]"):
        assert done.stdout.count(f"{line}\n") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ring-degree", 3], "ring_degree=3 x ulysses_degree=1 x tp_size=1 = 3 ranks, but 2 were launched"),
        (
            ["--ring-degree", 2, "--max-length", 5000],
            "max_length=5000 exceeds the model's max_position_embeddings=4096",
        ),
    ],
    ids=["world", "length"],
)
def test_bad_configurations_are_refused_in_one_line_with_exit_code_2(options, message, neox):
    """All rules: tests/planning/test_validation.py."""
    started = time.monotonic()
    done = deepspeed(2, "launch/bench.py", "--model", neox, "--dtype", "fp32", *options, expect=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "{" not in done.stdout
    assert time.monotonic() - started < 120  # not held up by a peer


def test_what_one_rank_refuses_or_has_unlike_others_all_refuse_with_exit_code_2(llama, tmp_path):
    """Each rank reads the checkpoint ``llama`` of its own folder, as each host does in a launch of several. Of ``cut``
    the last pipeline stage misses its head."""
    own = [tmp_path / str(rank) / "llama" for rank in (0, 1)]
    for folder in own:
        shutil.copytree(llama, folder)
    script = tmp_path / "script.py"
    script.write_text("""
import argparse, json, os, shutil, sys, torch, ds_ring
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
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
    found = [refusal(ds_ring.from_pretrained, "cut", ring_degree=1, pp_size=2)]
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
""")
    done = deepspeed(2, script, tmp_path, expect=2)
    all_found = map(json.loads, re.findall(r"^\[.*\]$", done.stdout, re.MULTILINE))
    (cut, *unlike), (own_cut, *other) = all_found
    lacks = "cut lacks lm_head.weight"
    assert {cut, own_cut} == {f"CheckpointError: {lacks}", f"CheckpointError: rank 1: {lacks}"}
    assert other == unlike
    parameter, field, file = (text.removeprefix("DisagreementError: ") for text in unlike)
    shape = r"\(300, 72\) torch.float32 with digest \w+"
    assert re.match(rf"ranks disagree on the model's tensor lm_head.weight: rank 0 has {shape}, rank 1 has ", parameter)
    assert "the model's rope_parameters.rope_theta: rank 0 has 10000.0, rank 1 has 500000.0; make it" in field
    size = (own[0] / "model.safetensors").stat().st_size
    assert re.search(rf"the checkpoint's model.safetensors: rank 0 has {size} bytes with digest \w+, rank 1", file)
    assert "error: ranks disagree on ds_ring.parallel.ring_impl: rank 0 has zigzag, rank 1 has contig" in done.stderr
    assert "Traceback" not in done.stderr


def test_documents_that_do_not_fit_are_refused(llama, documents, tmp_path):
    scored = [sys.executable, "launch/score.py", "--model", str(llama), "--dtype", "fp32"]
    done = run([*scored, "--max-length", "500", "--text", str(documents[0])], expect=2)
    assert "has 1001 tokens, more than max_length=500; raise --max-length" in done.stderr
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    config = RunConfig.load({"dtype": "fp32"}, model=str(llama))
    with pytest.raises(InputError, match="is empty"):
        read_documents(config, [str(empty)])
