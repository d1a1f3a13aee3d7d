"""What a small model is asked, the same unsharded and sharded: forwards, scores, generations."""

# Shapes: L tokens of a sequence, V vocabulary.
from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from benchmarks.models.tiny_models import SEED, SIZES
from ds_ring.cli.prompts import left_padded
from ds_ring.engine.engine import Engine
from ds_ring.errors import NumericsError

LENGTH = 75
"""Tokens before a generation."""
FEW = 4
"""New tokens of a generation in chunks, and of each turn of a conversation."""
CHUNK = 16
TURNS = (20, 25)
"""Tokens that the caller adds in each turn: together they are beyond every small model's thresholds but its last."""


@dataclass(frozen=True)
class Generated:
    """Greedy tokens [1, L], those of the caller among them; the distance of the two best logits of each new one."""

    tokens: Tensor
    margins: list[float]


@dataclass(frozen=True)
class Answers:
    """
    Attributes:
        logits: [L, V] of single sequences, then of those of one batch.
        scores: log-likelihoods of the tokens of each sequence of that batch, [L - 1].
        generated: by name, of whole prompts, of a prompt in chunks, and of the last turn of a conversation.
    """

    logits: list[Tensor]
    scores: list[Tensor]
    generated: dict[str, Generated]


def thresholds(config: PretrainedConfig) -> list[int]:
    """Lengths at which something changes in a model, as far as its config says."""
    text: Any = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    parts = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    found = [part.get("original_max_position_embeddings") for part in parts]
    if any("dynamic" in str(part.get("rope_type")) for part in parts):
        found.append(text.max_position_embeddings)
    found += [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return sorted({at for at in found if isinstance(at, int) and 1 < at < SIZES["max_position_embeddings"] // 4})


def lengths(config: PretrainedConfig) -> list[int]:
    """Far below, at, just above and far above every threshold, and ``LENGTH``."""
    return sorted({LENGTH, *(n for at in thresholds(config) for n in (at // 2, at, at + 1, 3 * at))})


def of_unsharded(model: PreTrainedModel, new_tokens: int, use_cache: bool = True) -> Answers:
    """On the CPU; every answer by a model that no earlier call has left anything in."""
    sequences = [_tokens(n) for n in lengths(model.config)]
    with torch.no_grad():
        alone = [copy.deepcopy(model)(ids, use_cache=False).logits[0] for ids in sequences]
        if not all(bool(torch.isfinite(logits).all()) for logits in alone):
            raise NumericsError("the unsharded model's logits are not finite")
        options = {"use_cache": use_cache, "output_logits": True, **GREEDY}
        prompt = _tokens(LENGTH)
        whole = _generate(copy.deepcopy(model), prompt, new_tokens, options)
        chunked = Generated(whole.tokens[:, : LENGTH + FEW], whole.margins[:FEW])
        last = _converse(copy.deepcopy(model), options)
    scores = [
        logits[:-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        for logits, ids in zip(alone, sequences, strict=True)
    ]
    return Answers(alone * 2, scores, {"": whole, "in chunks": chunked, "in a second turn": last})


def of_sharded(engine: Engine, new_tokens: int) -> Answers:
    """Collective; on the CPU. Margins are left out."""
    sequences = [_tokens(n) for n in lengths(engine.config)]
    logits = [engine(ids).logits[0].cpu() for ids in sequences]
    ids_BC, mask_BC = left_padded([ids[0].tolist() for ids in sequences], 0)
    batch_BCV = engine(ids_BC, mask_BC).logits.cpu()
    logits += [own[mask.bool()] for own, mask in zip(batch_BCV, mask_BC, strict=True)]
    scores = engine.score(ids_BC, mask_BC).log_probs
    options, prompt = {"output_logits": False, **GREEDY}, _tokens(LENGTH)
    whole = _generate(engine, prompt, new_tokens, options)
    chunked = _generate(engine, prompt, min(FEW, new_tokens), {**options, "prefill_chunk_size": CHUNK})
    last = _converse(engine, options)
    return Answers(logits, scores, {"": whole, "in chunks": chunked, "in a second turn": last})


GREEDY: dict[str, Any] = {
    "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True,
}  # fmt: skip


def _generate(model: Any, ids: Tensor, new_tokens: int, options: dict[str, Any], **more: Any) -> Any:
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **options, **more
    )  # fmt: skip
    margins: list[float] = []
    if found.logits is not None:
        best_two = torch.cat(found.logits).topk(2).values
        margins = (best_two[:, 0] - best_two[:, 1]).tolist()
    return Generated(found.sequences.cpu(), margins)


def _converse(model: Any, options: dict[str, Any]) -> Generated:
    """Two turns over one cache, where there is one."""
    first, more = (_tokens(n, seed) for seed, n in enumerate(TURNS, SEED + 1))
    begun = model.generate(first, attention_mask=torch.ones_like(first), max_new_tokens=FEW, **options)
    whole = torch.cat((begun.sequences.cpu(), more), 1)
    kept = {"past_key_values": begun.past_key_values} if options.get("use_cache", True) else {}
    found: Generated = _generate(model, whole, FEW, options, **kept)
    return found


def _tokens(length: int, seed: int = SEED) -> Tensor:
    return torch.randint(3, SIZES["vocab_size"], (1, length), generator=torch.Generator().manual_seed(seed))
