"""A trained checkpoint in a layout, beside transformers on the same device: perplexity of a text, and greedy
answers."""

# Shapes: L tokens, V vocabulary.
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ds_ring import api
from ds_ring.cli.prompts import tokens_of
from ds_ring.config import RunConfig
from ds_ring.engine.connect import local_device
from ds_ring.engine.engine import Engine
from ds_ring.engine.scoring import perplexity
from ds_ring.hf.attention import torch_dtype
from ds_ring.hf.loading import load_model
from ds_ring.utils.corpus import load_tokenizer, token_stream
from ds_ring.utils.device import device_name, release_memory

QUESTIONS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
    "What is the difference between a list and a tuple in Python?",
)
GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1}


def check(config: RunConfig, new_tokens: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Compare, with as many tokens of text as ``max_length`` says and a few questions. Collective.

    Returns:
        ``perplexity`` and ``answers`` of the layout, the same of transformers in the same dtype (``reference_``) and in
        fp32 (``fp32_``); ``equal_tokens``, of how many, up to the first difference of each answer.
    """
    path, device, tokenizer = config.checkpoint, local_device(), load_tokenizer(config.checkpoint)
    ids_1L = token_stream(path, config.benchmark.text, special_tokens=True)[None, : config.workload.max_length]
    prompts = [tokens_of(tokenizer, question, raw=False) for question in QUESTIONS]
    references: dict[str, dict[str, Any]] = {}
    for name, dtype in (("reference", torch_dtype(config.dtype)), ("fp32", torch.float32)):
        say(f"transformers in {dtype}: {ids_1L.shape[1]:,} tokens of text, {len(prompts)} questions")
        model = load_model(path, dtype, device)
        references[name] = _of_transformers(model, ids_1L, prompts, new_tokens)
        del model
        release_memory()
    engine = api.from_pretrained(config=config)
    say(f"{config.label}: the same")
    found = _of_engine(engine, ids_1L, prompts, new_tokens)
    pairs = list(zip(found["tokens"], references["reference"]["tokens"], strict=True))
    return {
        "layout": config.label,
        "gpus": engine.mesh.topology.world_size,
        "device": device_name(device),
        "dtype": config.dtype,
        "tokens_of_text": ids_1L.shape[1],
        "perplexity": found["perplexity"],
        "reference_perplexity": references["reference"]["perplexity"],
        "fp32_perplexity": references["fp32"]["perplexity"],
        "equal_tokens": sum(_common_start(own, other) for own, other in pairs),
        "reference_tokens": sum(len(other) for _, other in pairs),
        "equal_answers": sum(own == other for own, other in pairs),
        "reference_equal_to_fp32": sum(
            a == b for a, b in zip(references["reference"]["tokens"], references["fp32"]["tokens"], strict=True)
        ),
        "score_s": found["score_s"],
        "reference_score_s": references["reference"]["score_s"],
        "answers": [
            {"question": question, "answer": tokenizer.decode(tokens, skip_special_tokens=True)}
            for question, tokens in zip(QUESTIONS, found["tokens"], strict=True)
        ],
    }


def _of_engine(engine: Engine, ids_1L: Tensor, prompts: Sequence[list[int]], new_tokens: int) -> dict[str, Any]:
    engine.score(ids_1L)  # compiles kernels
    engine.settle()
    started = time.perf_counter()
    (likelihoods,) = engine.score(ids_1L).log_probs
    engine.settle()
    score_s = time.perf_counter() - started
    tokens = []
    for prompt in prompts:
        sequences: Any = engine.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, **GREEDY)
        tokens.append(sequences[0, len(prompt) :].tolist())
    return {"perplexity": perplexity(-float(likelihoods.double().mean())), "tokens": tokens, "score_s": score_s}


@torch.inference_mode()
def _of_transformers(
    model: PreTrainedModel, ids_1L: Tensor, prompts: Sequence[list[int]], new_tokens: int
) -> dict[str, Any]:
    ids_1L = ids_1L.to(model.device)
    model(ids_1L, logits_to_keep=1)
    started = time.perf_counter()
    logits_1LV = model(ids_1L).logits[:, :-1].float()
    nll = float(cross_entropy(logits_1LV[0], ids_1L[0, 1:]))
    score_s = time.perf_counter() - started
    tokens = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new_tokens, **GREEDY}
        sequences: Any = model.generate(ids, **options)
        tokens.append(sequences[0, len(prompt) :].tolist())
    return {"perplexity": perplexity(nll), "tokens": tokens, "score_s": score_s}


def _common_start(one: Sequence[int], other: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
