"""Every setting of transformers' ``GenerationConfig``: whether our generate serves it, and the values that it takes.

transformers' own loop runs over our forward, so that whatever it does with logits and tokens is served. A test holds
the table against the installed ``GenerationConfig``: no field is undecided.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from torch import Tensor

from ds_ring.config.sections import LEAST_TEMPERATURE

Verdict = Literal["served", "unused", "left_out", "mode", "refused"]
"""``served``: as in transformers. ``unused``: transformers' greedy search and sampling of a decoder do not look at it.
``left_out``: no token depends on it, only how tokens are computed or what is returned beside them; a checkpoint may ask
for it, a call may not. ``mode``: refused where transformers would take neither greedy search nor sampling for it.
``refused``: it would change tokens."""


@dataclass(frozen=True)
class Values:
    """What a setting may be, in words, and the test of it. None is always allowed: the setting is not given then."""

    words: str
    allow: Callable[[Any], bool]


@dataclass(frozen=True)
class Field:
    """A setting.

    Attributes:
        values: None: transformers itself checks it, where it is read.
        neutral: values that ask for nothing.
    """

    verdict: Verdict
    values: Values | None = None
    neutral: tuple[Any, ...] = ()


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _at_least(least: int) -> Values:
    return Values(f"a whole number of at least {least}", lambda value: _whole(value) and value >= least)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_id(value: Any) -> bool:
    """A vocabulary's own end is not known here; transformers makes tensors of 64-bit numbers."""
    return _whole(value) and -(2**63) <= value < 2**63


def _is_ids(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() <= 1 and value.numel() > 0 and not value.is_floating_point() and not value.is_complex()
    return _is_id(value) or (isinstance(value, list | tuple) and bool(value) and all(map(_is_id, value)))


def _is_strings(value: Any) -> bool:
    values = [value] if isinstance(value, str) else value
    return isinstance(values, list | tuple) and bool(values) and all(isinstance(s, str) and s for s in values)


_FLAG = Values("true or false", lambda value: isinstance(value, bool))
_NUMBER = Values("a finite number", _is_number)
_POSITIVE = Values("a finite number above 0", lambda value: _is_number(value) and value > 0)
_TEMPERATURE = Values(
    f"a finite number of at least {LEAST_TEMPERATURE:g}", lambda value: _is_number(value) and value >= LEAST_TEMPERATURE
)
_TIME = Values("a finite number of seconds from 0 on", lambda value: _is_number(value) and value >= 0)
_SHARE = Values("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
_ID = Values("a token id", lambda value: _is_ids(value) and not isinstance(value, list | tuple))
_IDS = Values("a token id or a list of them", _is_ids)
_LIST = Values("a list of token ids", lambda value: isinstance(value, list | tuple) and all(map(_is_id, value)))
_STRINGS = Values("a string or a list of strings, none of them empty", _is_strings)

_SERVED: dict[str, Values | None] = {
    "max_length": _at_least(1), "max_new_tokens": _at_least(1), "min_length": _at_least(0),
    "min_new_tokens": _at_least(0), "max_time": _TIME, "stop_strings": _STRINGS,
    "do_sample": _FLAG, "temperature": _TEMPERATURE, "top_k": _at_least(0), "top_p": _SHARE, "min_p": _SHARE,
    "top_h": _SHARE, "typical_p": _SHARE, "epsilon_cutoff": _SHARE, "eta_cutoff": _SHARE,
    "repetition_penalty": _POSITIVE, "encoder_repetition_penalty": _POSITIVE, "no_repeat_ngram_size": _at_least(0),
    "encoder_no_repeat_ngram_size": _at_least(0), "bad_words_ids": None, "renormalize_logits": _FLAG,
    "forced_bos_token_id": _ID, "forced_eos_token_id": _IDS, "remove_invalid_values": _FLAG,
    "exponential_decay_length_penalty": None, "suppress_tokens": _LIST, "begin_suppress_tokens": _LIST,
    "sequence_bias": None, "watermarking_config": None, "num_return_sequences": _at_least(1),
    "output_scores": _FLAG, "output_logits": _FLAG, "return_dict_in_generate": _FLAG,
    "pad_token_id": _ID, "bos_token_id": _IDS, "eos_token_id": _IDS, "prefill_chunk_size": _at_least(1),
}  # fmt: skip

FIELDS: dict[str, Field] = {
    **{name: Field("served", values) for name, values in _SERVED.items()},
    # Beams, an assistant, an encoder, a compiled or a static cache: there are none.
    "early_stopping": Field("unused", neutral=(False,)),
    "length_penalty": Field("unused", neutral=(1.0,)),
    "diversity_penalty": Field("unused", neutral=(0.0,)),
    "decoder_start_token_id": Field("unused"),
    "num_assistant_tokens": Field("unused", neutral=(20,)),
    "num_assistant_tokens_schedule": Field("unused", neutral=("constant",)),
    "assistant_confidence_threshold": Field("unused", neutral=(0.4,)),
    "max_matching_ngram_size": Field("unused"),
    "assistant_lookbehind": Field("unused", neutral=(10,)),
    "target_lookbehind": Field("unused", neutral=(10,)),
    "assistant_ensemble_weight": Field("unused"),
    "speculation_type": Field("unused"),
    "cache_config": Field("unused"),
    "max_cache_len": Field("unused"),
    "compile_config": Field("unused"),
    "disable_compile": Field("unused", neutral=(False,)),
    "continuous_batching_config": Field("unused"),
    "low_memory": Field("unused", neutral=(False,)),
    "use_cache": Field("left_out", _FLAG, neutral=(True,)),
    # transformers itself takes "hybrid" for its default, "dynamic".
    "cache_implementation": Field("left_out", neutral=("dynamic", "hybrid")),
    "prompt_lookup_num_tokens": Field("left_out"),
    "assistant_early_exit": Field("left_out"),
    "use_mtp": Field("left_out", neutral=(False,)),
    "output_attentions": Field("left_out", _FLAG, neutral=(False,)),
    "output_hidden_states": Field("left_out", _FLAG, neutral=(False,)),
    "num_beams": Field("mode", _at_least(1), neutral=(1,)),
    "num_beam_groups": Field("mode", _at_least(1), neutral=(1,)),
    "penalty_alpha": Field("mode", _NUMBER, neutral=(0,)),
    "dola_layers": Field("mode"),
    "constraints": Field("mode"),
    "force_words_ids": Field("mode"),
    "guidance_scale": Field("refused", _NUMBER, neutral=(1,)),
    "token_healing": Field("refused", _FLAG, neutral=(False,)),
    "is_assistant": Field("refused", _FLAG, neutral=(False,)),
    # Where a configuration comes from.
    "_from_model_config": Field("unused", neutral=(False, True)),
    "_commit_hash": Field("unused"),
    "transformers_version": Field("unused"),
}

WITHIN_VOCABULARY = ("forced_bos_token_id", "forced_eos_token_id")
"""Ids of these index logits."""
OF_SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
)  # fmt: skip
SILENT = ("_from_model_config", "_commit_hash", "transformers_version")


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether ``value`` is what a generation does without the setting."""
    if value is None:
        return True
    neutral = FIELDS[name].neutral if name in FIELDS else (False,)
    return any(type(value) in (type(one), int, float) and value == one for one in neutral)


def problem(name: str, value: Any, sampled: bool, origin: str = "") -> str | None:
    """What is wrong with the type or size of a setting's ``value``, in words; None: nothing.

    Args:
        sampled: settings of sampling take part.
        origin: said behind the value.
    """
    values = FIELDS[name].values if name in FIELDS else None
    if name in OF_SAMPLING and not sampled:
        values = _NUMBER  # published checkpoints have a temperature of 0 beside greedy search
    if value is None or values is None or values.allow(value):
        return None
    return f"{name}={value!r}{origin} must be {values.words}"
