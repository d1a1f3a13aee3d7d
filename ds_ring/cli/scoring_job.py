"""Documents scored in batches, the longest first: what does not fit shows at once, and the rest gets only faster."""

# Shapes: B documents of a batch, C columns, A targets of a token.
from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ds_ring.cli.documents import Document
from ds_ring.cli.scores_file import ScoresFile
from ds_ring.cli.scoring_progress import ScoringProgress
from ds_ring.config import RunConfig
from ds_ring.engine.engine import Engine
from ds_ring.engine.scoring import perplexity
from ds_ring.engine.token_scores import TokenScores
from ds_ring.hf import fingerprint
from ds_ring.hf.checkpoint import Checkpoint
from ds_ring.utils.model_config import read_config
from ds_ring.utils.unscored import UNSCORED

Entry = dict[str, Any]
"""A document's result."""


@dataclass(frozen=True)
class Lists:
    """Which lists, of a value a scored token, an entry gets besides: what the targets have, the ``top_k`` likeliest
    tokens, the entropies."""

    per_token: bool = False
    top_k: int = 0
    entropy: bool = False


def batches(documents: Sequence[Document], size: int) -> list[list[Document]]:
    """All documents that are not too long, ``size`` at a time, those of a batch alike in how many targets a token has.

    They depend on all documents, not on which of them are scored already: a document's figures are the same to the last
    bit in a run that goes on.
    """
    order = sorted(
        (document for document in documents if document.too_long is None),
        key=lambda document: (-(document.targets_a_token or 0), -len(document), document.index),
    )
    found = list[list[Document]]()
    for document in order:
        if not found or len(found[-1]) == size or found[-1][0].targets_a_token != document.targets_a_token:
            found.append([])
        found[-1].append(document)
    return found


def job_of(config: RunConfig, documents: Sequence[Document], lists: Lists) -> str:
    """Equal for runs that give the same figures: of the same documents, model, layout, dtype and options."""
    model = fingerprint.of_config(read_config(config.checkpoint)) | fingerprint.of_files(
        Checkpoint.open(config.checkpoint)
    )
    work = config.workload
    parts = [model, config.label, config.dtype, work.micro_batch_size, work.block_tokens, asdict(lists)]
    digest = hashlib.sha256(repr(parts).encode())
    for document in documents:
        digest.update(document.digest())
    return digest.hexdigest()[:12]


def score(
    engine: Engine,
    documents: Sequence[Document],
    lists: Lists,
    take: Callable[[list[Entry]], None],
    say: Callable[[str], None],
    done: Collection[int] = (),
) -> None:
    """Score every document. Collective.

    Args:
        take: is given entries as documents finish, on every rank.
        say: is given lines of progress.
        done: indices of documents that have an entry already, the same on all ranks. A batch of which all are done is
            left out; another is scored as a whole.
    """
    take([too_long(document) for document in documents if document.too_long is not None])
    size = engine.mesh.topology.dp * engine.run_config.workload.micro_batch_size
    left = [batch for batch in batches(documents, size) if not all(document.index in done for document in batch)]
    progress = ScoringProgress(sum(map(len, left)), sum(len(d) for batch in left for d in batch), say)
    for batch in left:
        ids_BC, mask_BC, targets = tensors(batch)
        scores = engine.score(ids_BC, mask_BC, target_ids=targets, top_k=lists.top_k, entropy=lists.entropy)
        take([entry(document, scores, number, lists) for number, document in enumerate(batch)])
        progress.advance(len(batch), sum(map(len, batch)))


def tensors(batch: Sequence[Document]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of ``Engine.score``, padded at their ends: ids and mask [B, C], targets [B, C] or [B, C, A]; None: the next."""
    ids = [document.ids_T.long() for document in batch]
    masks = [torch.ones_like(each) for each in ids]
    targets = None
    if any(document.targets is not None for document in batch):
        own = [_targets(document) for document in batch]
        targets = pad_sequence(own, batch_first=True, padding_value=UNSCORED)
    return pad_sequence(ids, batch_first=True), pad_sequence(masks, batch_first=True), targets


def _targets(document: Document) -> Tensor:
    if document.targets is not None:
        return document.targets.long()
    ids = document.ids_T.long()
    return torch.cat([ids[1:], ids.new_full((min(1, len(ids)),), UNSCORED)])


def entry(document: Document, scores: TokenScores, number: int, lists: Lists) -> Entry:
    """The result of ``document``, which is sequence ``number`` of ``scores``."""
    ranks, log_probs = scores.ranks[number], scores.log_probs[number]
    figures = figures_of(int((ranks > 0).sum()), float(log_probs.double().sum()))
    found: Entry = {"id": document.id, "index": document.index, "tokens": len(document), **figures, "too_long": None}
    if lists.per_token or lists.top_k or lists.entropy:
        found["positions"] = scores.positions[number].tolist()
    if lists.per_token:
        found |= {"log_probs": _floats(log_probs), "ranks": ranks.tolist()}
        found["is_argmax"] = scores.is_argmax[number].tolist()
    if scores.top_ids is not None and scores.top_log_probs is not None:
        found |= {"top_ids": scores.top_ids[number].tolist(), "top_log_probs": _floats(scores.top_log_probs[number])}
    if scores.entropies is not None:
        found["entropies"] = _floats(scores.entropies[number])
    return found


def figures_of(scored: int, log_likelihood: float) -> dict[str, Any]:
    """What ``log_likelihood``, the sum over so many scored targets in nats, comes to.

    ``nll`` is the mean of its negative, in nats a target (None where there is none), and ``perplexity`` the exponential
    of that (None also above the largest number, where nll > 709.7).
    """
    nll = -log_likelihood / scored if scored else None
    known = None if nll is None else perplexity(nll)
    return {"scored": scored, "nll": nll, "perplexity": known, "log_likelihood": log_likelihood}


def too_long(document: Document) -> Entry:
    """The result of a document that is left out."""
    nothing = {"tokens": None, "scored": 0, "nll": None, "perplexity": None, "log_likelihood": None}
    return {"id": document.id, "index": document.index, **nothing, "too_long": document.too_long}


def _floats(values: Tensor) -> list[Any]:
    """fp32 values in no more digits than tell them apart."""
    if values.dim() > 1:
        return [_floats(each) for each in values]
    return [float(f"{value:.9g}") for value in values.tolist()]


def of_files(engine: Engine, documents: Sequence[Document], say: Callable[[str], None]) -> dict[str, Any]:
    """Scores of text files. Collective.

    Returns:
        ``{"layout", "documents": [{file, tokens, nll, perplexity, log_likelihood}]}``, in the order of ``documents``,
        the figures as of ``entry``.
    """
    found = dict[int, Entry]()
    score(engine, documents, Lists(), lambda entries: found.update({each["index"]: each for each in entries}), say)
    fields = ("tokens", "nll", "perplexity", "log_likelihood")
    listed = [{"file": found[i]["id"], **{name: found[i][name] for name in fields}} for i in range(len(documents))]
    return {"layout": engine.run_config.label, "documents": listed}


def into_file(
    engine: Engine,
    documents: Sequence[Document],
    lists: Lists,
    file: ScoresFile | None,
    job: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Scores of documents, as lines of ``file``, which rank 0 has. Collective. Returns totals, on rank 0."""
    engine.mesh["world"].agree(documents=f"a job with digest {job}")
    done = engine.gather(None if file is None else sorted(file.done))[0] or ()
    if done:
        say(f"{len(done):,} of {len(documents):,} documents have their lines already")

    def take(entries: list[Entry]) -> None:
        if file is not None:
            file.append(entries)

    started = time.perf_counter()
    score(engine, documents, lists, take, say, set(done))
    if file is None:
        return {}
    totals = file.finish()
    figures = figures_of(totals["scored"], totals["log_likelihood"])
    return {**totals, **figures, "wall_s": time.perf_counter() - started}
