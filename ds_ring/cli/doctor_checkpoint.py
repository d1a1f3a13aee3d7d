"""Doctor's checks of a checkpoint: all that a run does before it reads weights, without ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ds_ring.cli.findings import Finding
from ds_ring.config import RunConfig
from ds_ring.engine.dry_run import dry_run
from ds_ring.errors import UserError
from ds_ring.hf.checkpoint import Checkpoint
from ds_ring.hf.dims import model_dims
from ds_ring.hf.generation_settings import read_generation_config
from ds_ring.hf.tensor_fit import check_fit
from ds_ring.utils.corpus import load_tokenizer
from ds_ring.utils.model_config import read_config

TOKENIZER = ("tokenizer*", "vocab.*", "*.tiktoken", "spiece.model", "sentencepiece*", "tekken.json")
"""Names of the files that tokenizers are in."""


def checkpoint_findings(run: RunConfig) -> Iterator[Finding]:
    """Whether the files are there, the model can be sharded, and the tensors are the model's."""
    try:
        path = run.checkpoint
        checkpoint, config = Checkpoint.open(path), read_config(path)
        dims = model_dims(config)
        read_generation_config(path)
        dry_run(config, RunConfig.load({"dtype": run.dtype}))
        check_fit(checkpoint, config)
    except UserError as error:
        yield Finding("checkpoint", "problem", str(error))
        return
    files = len(set(checkpoint.files.values()))
    yield Finding(
        "checkpoint", "ok",
        f"{path}: {dims.model_type}, {dims.num_layers} layers, {run.dtype}, {files} file(s) of weights",
    )  # fmt: skip
    yield _tokenizer(path)


def _tokenizer(path: str) -> Finding:
    if not any(found for name in TOKENIZER for found in Path(path).glob(name)):
        return Finding("tokenizer", "ok", "none, which generate and score need")
    try:
        return Finding("tokenizer", "ok", type(load_tokenizer(path)).__name__)
    except UserError as error:
        return Finding("tokenizer", "problem", str(error))
