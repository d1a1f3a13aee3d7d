"""A user's own script under the launcher."""

import json
import re

import pytest
from transformers import AutoTokenizer

from ds_ring.cli.seeded_checkpoint import make_checkpoint
from tests.helpers.launching import ROOT, deepspeed, last_line

pytestmark = pytest.mark.launch


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
    scores = "[[len(n) for n in nats], list(scores.top_ids[0].shape), list(next_tokens.shape), list(logits.shape)]"
    script = tmp_path / "example.py"
    parts = [(readme, chat), (generation, turns), (scoring, scores)]
    script.write_text(
        "".join(code + shown.replace("SHAPES", shape) for code, shape in parts).replace("DIR", str(checkpoint))
    )
    done = deepspeed(2, script)
    prompt = len("user: What is the capital of France?\nassistant:")
    for line in (f"[{prompt}, True]", "[[2, 113], True]", "[[14, 12], [14, 3], [2], [2, 15, 512]]"):
        assert done.stdout.count(f"{line}\n") == 2
