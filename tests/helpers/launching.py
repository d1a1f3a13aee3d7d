"""Real processes: scripts under the deepspeed launcher, checkpoints for them, and what they print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from ds_ring.cli.seeded_checkpoint import byte_tokenizer
from ds_ring.process.launcher import reserved_port
from tests.helpers.limits import HANG_S

ROOT = Path(__file__).resolve().parents[2]


def environment(on_gpu: bool = False) -> dict[str, str]:
    """Of a process that finds this interpreter's commands and this tree's packages."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    on_cpu = {} if on_gpu else {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **on_cpu, "PATH": path, "PYTHONPATH": python_path}


def run(command: Sequence[object], expect: int = 0, on_gpu: bool = False) -> subprocess.CompletedProcess[str]:
    """A command run to its end, which is to be the exit code ``expect``."""
    done = subprocess.run(
        [str(word) for word in command], cwd=ROOT, env=environment(on_gpu), capture_output=True, text=True,
        timeout=HANG_S,
    )  # fmt: skip
    assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def launcher(ranks: int, port: int) -> list[str]:
    """The launcher's command, to which a script and its options are added."""
    return ["deepspeed", "--quiet", "--no_local_rank", "--master_port", str(port), "--num_gpus", str(ranks)]


def deepspeed(ranks: int, *script: object, expect: int = 0, on_gpu: bool = False) -> subprocess.CompletedProcess[str]:
    """A script and its options on so many ranks; in front of it may be options of the launcher."""
    with reserved_port() as port:
        return run([*launcher(ranks, port), *script], expect, on_gpu)


@dataclass(frozen=True)
class Run:
    """What one of several runs left: by rank its standard output and exit code, and all ranks' standard error."""

    stdouts: list[str]
    stderr: str
    codes: list[int]

    @property
    def stdout(self) -> str:
        return self.stdouts[0]


def in_one_start(ranks: int, scripts: Sequence[Sequence[object]], folder: Path) -> list[Run]:
    """Scripts with their options, one after the other in the same ranks; ``folder`` takes what they say."""
    folder.mkdir(parents=True, exist_ok=True)
    commands = json.dumps([[str(word) for word in script] for script in scripts])
    deepspeed(ranks, "tests/helpers/one_start.py", folder, commands)

    def said(number: int, rank: int, what: str) -> str:
        return (folder / f"{number}.{rank}.{what}").read_text()

    return [
        Run(
            [said(number, rank, "out") for rank in range(ranks)],
            "".join(said(number, rank, "err") for rank in range(ranks)),
            [int(said(number, rank, "code")) for rank in range(ranks)],
        )
        for number in range(len(scripts))
    ]


def last_line(done: subprocess.CompletedProcess[str] | Run) -> Any:
    """A script's result."""
    return json.loads(done.stdout.strip().splitlines()[-1])


def save(directory: Path, config: PretrainedConfig) -> Path:
    """A checkpoint of a random model, with a tokenizer of bytes."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def save_llama(directory: Path, **sizes: Any) -> Path:
    """A checkpoint of two layers with two key/value heads of four."""
    config = LlamaConfig(
        **{
            "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
            "num_hidden_layers": 2, "vocab_size": 300, "max_position_embeddings": 4096, "initializer_range": 0.3,
        }
        | sizes
    )  # fmt: skip
    return save(directory, config)
