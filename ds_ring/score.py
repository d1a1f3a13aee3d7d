"""Log-likelihood and perplexity of whole documents: what prefill throughput is for."""

from __future__ import annotations

import math
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from ds_ring.engines.base import Engine
from ds_ring.errors import InputError
from ds_ring.text import load_tokenizer, read_text


def read_documents(engine: Engine, files: list[str]) -> list[list[int]]:
    """Tokens of each file.

    Raises:
        InputError: no file, fewer than two tokens (nothing to predict), or more than ``max_length``.
    """
    if not files:
        raise InputError("no documents: give --text FILE…")
    config = engine.config
    tokenizer = load_tokenizer(config.ring.model or "")
    documents = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in read_text(files)]
    for file, tokens in zip(files, documents, strict=True):
        limit = config.workload.max_length
        if len(tokens) < 2:
            raise InputError(f"{file} has {len(tokens)} token(s); at least 2 are needed to predict one from another")
        if len(tokens) > limit:
            raise InputError(f"{file} has {len(tokens)} tokens, more than max_length={limit}; raise --max-length")
    return documents


def score(engine: Engine, files: list[str], show_progress: bool) -> dict[str, Any]:
    """``{"documents": [{file, tokens, nll, perplexity, log_likelihood}]}``.

    ``nll`` is the mean negative log-likelihood in nats of a document's tokens after its first, ``perplexity`` its
    exponential, ``log_likelihood`` the sum.
    """
    documents = read_documents(engine, files)
    at_a_time = engine.mesh.topology.dp * engine.config.workload.micro_batch_size
    # Neighbours of like length waste the least padding; the order of results stays the caller's.
    order = sorted(range(len(files)), key=lambda i: len(documents[i]))
    results: dict[int, dict[str, Any]] = {}
    with Progress(console=Console(stderr=True), disable=not show_progress) as progress:
        bar = progress.add_task("scoring", total=sum(map(len, documents)))
        for start in range(0, len(order), at_a_time):
            group = order[start : start + at_a_time]
            # Replicas without a document of their own repeat one; what they find is left out.
            rows = [documents[i] for i in group]
            rows += rows[:1] * max(0, engine.mesh.topology.dp - len(rows))
            longest = max(map(len, rows))
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
            for i, scores in zip(group, engine.token_log_likelihoods(ids, mask), strict=False):
                total = float(scores.double().sum())
                nll = -total / len(scores)
                results[i] = {
                    "file": files[i],
                    "tokens": len(documents[i]),
                    "nll": nll,
                    "perplexity": math.exp(nll) if nll < 700 else math.inf,
                    "log_likelihood": total,
                }
            progress.advance(bar, sum(len(documents[i]) for i in group))
    return {"layout": engine.mesh.topology.label(), "documents": [results[i] for i in range(len(files))]}
