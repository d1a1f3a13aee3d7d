"""Real processes: scripts under the deepspeed launcher, checkpoints for them, and what they print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ds_ring.cli.seeded_checkpoint import byte_tokenizer
from ds_ring.process.launcher import free_port

ROOT = Path(__file__).resolve().parents[2]


def run(command: list[str], expect: int = 0) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def deepspeed(ranks: int, script: str | Path, *options: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    launcher = [
        "deepspeed",
        "--quiet",
        "--no_local_rank",
        "--master_port",
        str(free_port()),
        "--num_gpus",
        str(ranks),
    ]
    return run([*launcher, str(script), *map(str, options)], expect)


def last_line(done: subprocess.CompletedProcess[str]) -> dict:
    return json.loads(done.stdout.strip().splitlines()[-1])


def save(directory: Path, config) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def agree_on_two_gpus(baselines: Sequence[str], head_dim: int, tmp_path: Path) -> None:
    # Scores of moderate size, as in a trained model: in fp16 larger ones differ by their rounding.
    model = wide_head_llama(tmp_path / "llama", head_dim=head_dim, initializer_range=0.05)
    files = [ROOT / "ds_configs" / file for file in ("gpu2/ring2.json", *baselines)]
    work = ["--model", model, "--max-length", 1001, "--sweep", 500, "--batch-size", 3]
    command = [sys.executable, "launch/compare.py", "--layouts", *files, *work, "--output", tmp_path / "compare.json"]
    subprocess.run([str(word) for word in command], cwd=ROOT, env=dict(os.environ), check=True, timeout=600)
    document = json.loads((tmp_path / "compare.json").read_text())
    assert document["failed"] == []
    assert [row["layout"] for row in document["rows"]] == [file.stem for file in files]
    for row in document["sweep"]:
        assert row["agrees"], row["layout"]
        assert row["bytes_sent_per_rank"] > 0


def wide_head_llama(directory: Path, **sizes: float) -> Path:
    config = LlamaConfig(
        **{
            "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
            "num_hidden_layers": 2, "vocab_size": 300, "max_position_embeddings": 4096, "initializer_range": 0.3,
        }
        | sizes
    )  # fmt: skip
    return save(directory, config)
