"""Documents scored by real processes over gloo, in every kind of layout and without a launcher."""

import math
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_ring.cli.documents import read_files
from ds_ring.config import RunConfig
from ds_ring.errors import InputError
from tests.helpers.launching import ROOT, deepspeed, in_one_start, last_line, run

pytestmark = pytest.mark.launch

FIVE_DIGITS = 5e-6
TWO_RANKS = {
    "ring2": ("--ring-degree", 2),
    "dp2": ("--dp-size", 2),
    "pp2": ("--pp-size", 2),
    "ring2_sharded": ("--ring-degree", 2, "--weights", "sharded"),
    "ring2_streamed": ("--ring-degree", 2, "--weights", "streamed"),
}


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


def scoring(llama, documents, *layout):
    return ["launch/score.py", "--model", llama, "--dtype", "fp32", *layout, "--text", *documents]


@pytest.fixture(scope="module")
def on_two_ranks(llama, documents, tmp_path_factory):
    scripts = [scoring(llama, documents, *layout) for layout in TWO_RANKS.values()]
    return dict(zip(TWO_RANKS, in_one_start(2, scripts, tmp_path_factory.mktemp("scored")), strict=True))


@pytest.mark.parametrize("layout", ["ulysses3", *TWO_RANKS])
def test_score_gives_the_unsharded_perplexity_of_every_document(
    layout, llama, documents, unsharded_perplexity, request
):
    if layout in TWO_RANKS:
        done = request.getfixturevalue("on_two_ranks")[layout]
        assert done.codes == [0, 0], done.stderr
    else:
        done = deepspeed(3, *scoring(llama, documents, "--ulysses-degree", 3))
    found = last_line(done)
    assert found["layout"] == layout
    assert [d["file"] for d in found["documents"]] == [str(f) for f in documents]
    assert [d["tokens"] for d in found["documents"]] == [1001, 63, 740]
    for document, want in zip(found["documents"], unsharded_perplexity, strict=True):
        assert document["perplexity"] == pytest.approx(want, rel=FIVE_DIGITS)
        assert document["nll"] == pytest.approx(math.log(want), rel=FIVE_DIGITS)


def test_score_without_a_launcher_is_a_world_of_one(llama, documents, unsharded_perplexity):
    done = run([sys.executable, *scoring(llama, documents[:1])])
    assert last_line(done)["documents"][0]["perplexity"] == pytest.approx(unsharded_perplexity[0], rel=FIVE_DIGITS)


def test_documents_that_do_not_fit_are_refused(llama, documents, tmp_path):
    scored = [sys.executable, "launch/score.py", "--model", str(llama), "--dtype", "fp32"]
    done = run([*scored, "--max-length", "500", "--text", str(documents[0])], expect=2)
    assert "has 1001 tokens, more than max_length=500; raise --max-length" in done.stderr
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    config = RunConfig.load({"dtype": "fp32"}, model=str(llama))
    with pytest.raises(InputError, match="is empty"):
        read_files(config, [str(empty)])
