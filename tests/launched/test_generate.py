"""``generate`` in real processes over gloo: the script, and sampling, whose generator threads would share."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

from ds_ring.cli.prompts import left_padded
from tests.helpers.launching import in_one_start, last_line, run, save

pytestmark = pytest.mark.launch

PROMPTS = ["The sequence is cut over the ranks. ", "Short: ", "A third one, somewhat longer than the second. "]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    config = LlamaConfig(
        hidden_size=72, num_attention_heads=9, num_key_value_heads=3, head_dim=8, intermediate_size=96,
        num_hidden_layers=2, vocab_size=300, max_position_embeddings=256, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return save(tmp_path_factory.mktemp("llama"), config)


def alone(checkpoint, text: str, new: int) -> list[int]:
    """transformers' greedy tokens for one prompt, none of them a toss-up."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(checkpoint)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = model.generate(
            ids, max_new_tokens=new, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True
        )
    best_two = torch.stack(found.logits).topk(2).values
    assert (best_two[..., 0] - best_two[..., 1]).min() > 2e-4
    return found.sequences[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def on_two_ranks(llama, tmp_path_factory):
    """(the script's run on all prompts, one of them from a file; the run of ``SAMPLING``)."""
    folder = tmp_path_factory.mktemp("generate")
    file, sampling = folder / "prompt.txt", folder / "sampling.py"
    file.write_text(PROMPTS[2])
    sampling.write_text(SAMPLING)
    options = ["--dtype", "fp32", "--ring-degree", 2, "--prefill-chunk", 16, "--micro-batch-size", 3]
    asked = ["--prompt", *PROMPTS[:2], "--prompt-file", file, "--max-new-tokens", 16]
    ids, mask = left_padded([list(text.encode()) for text in PROMPTS[:2]], 0)
    scripts = [
        ["launch/generate.py", "--model", llama, *options, *asked, "--output", folder / "found.json"],
        [sampling, llama, 2, json.dumps(ids.tolist()), json.dumps(mask.tolist())],
    ]
    script, sampled = in_one_start(2, scripts, folder)
    assert last_line(script) == json.loads((folder / "found.json").read_text())
    return script, sampled


def test_prompts_of_unequal_length_and_a_file(llama, on_two_ranks):
    done, _ = on_two_ranks
    assert done.codes == [0, 0], done.stderr
    found = last_line(done)
    assert found["layout"] == "ring2"
    for text, completion in zip(PROMPTS, found["completions"], strict=True):
        assert completion["prompt_tokens"] == len(text)
        assert completion["token_ids"] == alone(llama, text, 16)
        assert completion["text"] == AutoTokenizer.from_pretrained(llama).decode(
            completion["token_ids"], skip_special_tokens=True
        )
    assert found["ttft_ms"] > 0
    assert found["decode_tpot_ms"] > 0
    total_s = (found["ttft_ms"] + 15 * found["decode_tpot_ms"]) / 1e3
    assert found["tokens_per_second"] == pytest.approx(3 * 16 / total_s)
    assert 0 < found["cache_gib_per_rank"] < 1e-3
    assert "prefill of 89 tokens in 3 rows" in done.stderr
    assert f"first token after {found['ttft_ms']:,.0f} ms, {found['decode_tpot_ms']:.2f} ms a token" in done.stderr
    assert "Warning" not in done.stderr


def test_one_prompt_streams_without_a_launcher(llama):
    options = ["--dtype", "fp32", "--prompt", PROMPTS[0], "--max-new-tokens", 8]
    done = run([sys.executable, "launch/generate.py", "--model", llama, *options])
    (completion,) = last_line(done)["completions"]
    assert completion["text"]
    assert completion["text"] in done.stderr


def test_what_passes_leave_in_memory_is_told(llama):
    options = ["--dtype", "fp32", "--prompt", PROMPTS[0], "--max-new-tokens", 8, "--passes", 2]
    done = run([sys.executable, "launch/bench_generate.py", "--model", llama, *options])
    found = last_line(done)
    assert list(found["held_gib_after_pass"]) == ["1", "2"]
    assert all(0.01 < gib < 100 for gib in found["held_gib_after_pass"].values())
    assert found["held_growth"] == found["held_gib_after_pass"]["2"] / found["held_gib_after_pass"]["1"]
    (completion,) = found["completions"]
    assert completion["text"]
    assert completion["text"] in done.stderr


def test_what_cannot_work_is_refused_in_one_line(tmp_path):
    gpt2 = save(tmp_path, GPT2Config(n_embd=64, n_head=4, n_layer=2, vocab_size=300, n_positions=256))
    # What two ranks would hold is refused for one as well, but only where the engine is made.
    options = ["--model", str(gpt2), "--dtype", "fp32", "--ring-degree", "2", "--prompt", "x" * 250]
    done = run([sys.executable, "launch/generate.py", *options], expect=2)
    assert "250 tokens of input + max_new_tokens=64 exceed the model's max_position_embeddings=256" in done.stderr
    assert "Traceback" not in done.stderr


SAMPLING = """
import json, sys, torch, ds_ring
from transformers import AutoModelForCausalLM
path, ranks = sys.argv[1], int(sys.argv[2])
ids = torch.tensor(json.loads(sys.argv[3]))
mask = torch.tensor(json.loads(sys.argv[4]))
options = dict(do_sample=True, temperature=1.5, top_k=40, top_p=0.95, max_new_tokens=24, pad_token_id=0)
whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
engine = ds_ring.from_pretrained(path, dtype="fp32", ring_degree=ranks)
rank = engine.mesh.rank
torch.manual_seed(5)
with torch.no_grad():
    want = whole.generate(ids, attention_mask=mask, **options)
after = torch.get_rng_state()
torch.manual_seed(5)
same = engine.generate(ids, mask, **options)
assert torch.equal(same, want), (same, want)
assert torch.equal(torch.get_rng_state(), after), "the generator goes on as with transformers"
torch.manual_seed(100 + rank)
before = torch.get_rng_state()
other = engine.generate(ids, mask, **options)
everyone = engine.mesh["world"].all_gather_objects(other.tolist())
assert all(o == everyone[0] for o in everyone), "one sequence for all"
assert not torch.equal(other, want), "another seed"
assert (rank == 0) == (not torch.equal(torch.get_rng_state(), before)), "others get their generator back"
timed = engine.generate(ids, mask, **options | {"max_time": 0.05, "max_new_tokens": 150})
everyone = engine.mesh["world"].all_gather_objects(timed.tolist())
assert all(o == everyone[0] for o in everyone), "the clock of rank 0 is everyone's"
assert timed.shape[1] < ids.shape[1] + 150
sys.stdout.write("agrees\\n")
sys.stdout.flush()
from ds_ring.cli.options import leave; leave(0)
"""


def test_sampling_is_transformers_own_and_the_same_on_every_rank(on_two_ranks):
    _, done = on_two_ranks
    assert done.codes == [0, 0], done.stderr
    assert [said.count("agrees") for said in done.stdouts] == [1, 1]
