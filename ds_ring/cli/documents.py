"""Log-likelihood and perplexity of whole documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ds_ring.cli.tokenizing import plain, tokenized
from ds_ring.config import RunConfig
from ds_ring.engine.engine import Engine
from ds_ring.engine.scoring import perplexity
from ds_ring.errors import InputError
from ds_ring.hf.checkpoint import Checkpoint
from ds_ring.hf.dims import model_dims
from ds_ring.utils.corpus import load_tokenizer, read_text
from ds_ring.utils.model_config import read_config
from ds_ring.utils.progress import make_console

Document = tuple[str, list[int]]
"""(file, its token ids)"""


def read(config: RunConfig, files: Sequence[str], special_tokens: bool = True) -> list[Document]:
    """Every file with its tokens, in order.

    Args:
        special_tokens: with those that the tokenizer adds by itself: what transformers' ``tokenizer(text)`` gives.

    Raises:
        InputError: no file, fewer than two tokens (nothing to predict), or more than ``max_length`` where that is
            given, or than the model has positions.
        ConfigError, CheckpointError: no model, or none with a tokenizer.
    """
    if not files:
        raise InputError("no documents: give --text FILE…")
    Checkpoint.open(config.checkpoint)
    tokenizer = load_tokenizer(config.checkpoint)
    name, limit, advice = _limit(config)
    documents = list[Document]()
    for file, text in zip(files, read_text(files), strict=True):

        def check(count: int, file: str = file) -> None:
            if limit is not None and count > limit:
                raise InputError(f"{file} has {count} tokens, more than {name}={limit}{advice}")

        tokens = tokenized(plain(tokenizer, special_tokens), text, file, check)
        if len(tokens) < 2:
            raise InputError(f"{file} has {len(tokens)} token(s); at least 2 are needed to predict one from another")
        documents.append((file, tokens))
    return documents


def _limit(config: RunConfig) -> tuple[str, int | None, str]:
    """(what limits a document's tokens, how many, what to do about it)."""
    if "max_length" in config.workload.model_fields_set:
        return "max_length", config.workload.max_length, "; raise --max-length"
    return "the model's max_position_embeddings", model_dims(read_config(config.checkpoint)).max_positions, ""


def sized(config: RunConfig, documents: Sequence[Document]) -> RunConfig:
    """``config`` with the length of ``documents`` as the workload's, and their number where none is given."""
    work = config.workload
    number = work.batch_size if "batch_size" in work.model_fields_set else len(documents)
    return RunConfig.load(config, batch_size=number, max_length=max(len(tokens) for _, tokens in documents))


def score(engine: Engine, documents: list[Document], show_progress: bool) -> dict[str, Any]:
    """Scores of every document. Collective.

    Returns:
        ``{"layout", "documents": [{file, tokens, nll, perplexity, log_likelihood}]}``, in the order of ``documents``.
        ``nll`` is the mean negative log-likelihood in nats of a document's tokens after its first, ``perplexity`` its
        exponential, None where that is above the largest number (nll > 709.7), ``log_likelihood`` the sum.
    """
    replicas = engine.mesh.topology.dp
    at_a_time = replicas * engine.run_config.workload.micro_batch_size
    # Sorted by length, so that documents of one batch need little padding.
    order = sorted(range(len(documents)), key=lambda i: len(documents[i][1]))
    found: dict[int, dict[str, Any]] = {}
    with Progress(console=make_console(), disable=not show_progress) as progress:
        bar = progress.add_task("scoring", total=sum(len(tokens) for _, tokens in documents))
        for start in range(0, len(order), at_a_time):
            group = order[start : start + at_a_time]
            sequences = [documents[i][1] for i in group]
            # A replica without a document of its own repeats the first; its scores are dropped.
            ids, mask = right_padded(sequences + sequences[:1] * (replicas - len(sequences)))
            for i, scores in zip(group, engine.score(ids, mask).log_probs, strict=False):
                found[i] = entry(documents[i][0], scores)
            progress.advance(bar, sum(map(len, sequences)))
    return {"layout": engine.run_config.label, "documents": [found[i] for i in range(len(documents))]}


def right_padded(sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(token ids [B, C], mask [B, C]) of ``sequences``, padded at their ends."""
    tensors = [torch.tensor(tokens) for tokens in sequences]
    masks = [torch.ones_like(tensor) for tensor in tensors]
    return pad_sequence(tensors, batch_first=True), pad_sequence(masks, batch_first=True)


def entry(file: str, scores: Tensor) -> dict[str, Any]:
    """A document's result from the log-likelihoods of its tokens after the first."""
    total = float(scores.double().sum())
    nll = -total / len(scores)
    found = {"file": file, "tokens": len(scores) + 1, "nll": nll, "perplexity": perplexity(nll)}
    return {**found, "log_likelihood": total}
