"""Functions and objects of the caller's that transformers' ``generate`` calls at each step: what they may be, and how
all ranks go by those of rank 0."""

# Shapes: B sequences of the caller's batch, C columns, V vocabulary.
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteriaList
from transformers.generation import BaseStreamer

from ds_ring.errors import InputError
from ds_ring.transport.base import Transport

LISTS = ("logits_processor", "stopping_criteria")
CHANGING_SCORES = ("logits_processor", "prefix_allowed_tokens_fn")
OF_CALLER = (*LISTS, "prefix_allowed_tokens_fn", "tokenizer")
"""Options of ``generate`` that are objects of the caller's."""


def check_callbacks(options: dict[str, Any], streamer: Any, progress: Any) -> None:
    """Raise InputError for what transformers could not call."""
    for name in LISTS:
        value = options.get(name)
        if value is not None and not (isinstance(value, list | tuple) and all(map(callable, value))):
            raise InputError(f"{name} must be a list of functions, not {_short(value)}")
    functions = {"prefix_allowed_tokens_fn": options.get("prefix_allowed_tokens_fn"), "progress": progress}
    for name, value in functions.items():
        if value is not None and not callable(value):
            raise InputError(f"{name} must be a function, not {_short(value)}")
    if streamer is not None and not (_has(streamer, "put") and _has(streamer, "end")):
        raise InputError(f"streamer must be one of transformers' ({BaseStreamer.__name__}), not {_short(streamer)}")


def kinds(options: dict[str, Any]) -> dict[str, str]:
    """Of each of ``OF_CALLER`` what ranks compare: whether it is given, and the kinds of what it holds."""
    return {name: _kind(options.get(name)) for name in OF_CALLER}


def _kind(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_kind, value)) or "none"
    return "none" if value is None else type(value).__name__


def _has(value: Any, method: str) -> bool:
    return callable(getattr(value, method, None))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class SameScores(LogitsProcessor):
    """Behind all others: scores as rank 0 has them."""

    def __init__(self, everyone: Transport) -> None:
        self._everyone = everyone

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._everyone.broadcast(scores, 0)


class SameChoice(StoppingCriteriaList):
    """Criteria behind which all ranks go on with the tokens of rank 0, and with its word for which sequences end.

    Equal logits are not enough: a callback may hold a state of its own, read a clock or draw random numbers, and
    kernels of sampling that sum in any order may round differently on each rank.
    """

    def __init__(self, criteria: StoppingCriteriaList, everyone: Transport) -> None:
        super().__init__(criteria)
        self._everyone = everyone

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        # Written in place, as transformers takes the next step's tokens, and its result, from this tensor.
        input_ids[:, -1] = self._everyone.broadcast(input_ids[:, -1], 0)
        done_B = super().__call__(input_ids, scores, **kwargs)
        return self._everyone.broadcast(done_B.to(torch.uint8), 0).bool()


def chosen_alike(settings: Any, options: dict[str, Any]) -> bool:
    """Whether every rank's choice is the same without a word: greedy, and nothing of the caller's takes part."""
    called: list[Any] = [options.get(n) for n in (*LISTS, "prefix_allowed_tokens_fn")]
    return not (settings.do_sample or settings.max_time is not None or any(called))
