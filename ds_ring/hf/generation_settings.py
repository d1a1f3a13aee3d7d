"""The settings of a generation, of a call and of the checkpoint, go through one admission: what would change tokens and
is not served is refused by name; what no token depends on is left out with a line."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation import GenerationMixin, GenerationMode, SequenceBiasLogitsProcessor
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from ds_ring.errors import CheckpointError, InputError, in_one_line
from ds_ring.hf.generation_fields import FIELDS, SILENT, WITHIN_VOCABULARY, asks_for_nothing, problem

log = logging.getLogger("ds_ring")

SPREAD = "with a cache that is spread over ranks"
LEFT_OUT = (
    *(name for name, field in FIELDS.items() if field.verdict == "left_out"),
    "cache_config", "max_cache_len", "compile_config",
)  # fmt: skip
SERVED_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def read_generation_config(directory: str | Path) -> GenerationConfig:
    """What a checkpoint's generation_config.json says or, without one, its config.json, as transformers has it.

    Raises:
        CheckpointError: transformers cannot read it, where it would go on without a word.
    """
    file = Path(directory) / GENERATION_CONFIG_NAME
    if not file.exists():
        return _made(directory, Path(directory) / CONFIG_NAME, _from_model_config=True)
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:  # not JSON, or not even text
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not {fields!r}")
    return _made(directory, file, fields)


def _made(directory: str | Path, file: Path, fields: dict[str, Any] | None = None, **options: Any) -> GenerationConfig:
    try:
        found: GenerationConfig = GenerationConfig.from_pretrained(
            directory, config_file_name=file.name, local_files_only=True, **options
        )
    except Exception as error:  # settings of a wrong type end in errors of any kind
        wrong = [why for name, value in (fields or {}).items() if (why := problem(name, value, sampled=False))]
        why = "; ".join(wrong) or in_one_line(error)
        raise CheckpointError(f"transformers cannot use the settings of {file}: {why}") from None
    return found


@dataclass(frozen=True)
class Asked:
    """The settings of one generation, by who asks for them. A call's count before the checkpoint's.

    Attributes:
        effective: of both.
        by_checkpoint: names of those that the checkpoint alone asks for.
    """

    effective: dict[str, Any]
    by_checkpoint: frozenset[str]

    @classmethod
    def of(cls, checkpoint: GenerationConfig, given: GenerationConfig | None, options: dict[str, Any]) -> Asked:
        """
        Args:
            given: the call's ``generation_config``. What it has in common with the checkpoint's comes from there.
            options: arguments of the call that are settings or not.
        """
        if given is not None and not isinstance(given, GenerationConfig):
            raise InputError(f"generation_config must be a GenerationConfig, not a {type(given).__name__}")
        own, called = vars(checkpoint), vars(given) if given is not None else {}
        names = dict.fromkeys(name for source in (own, called) for name in source if _is_setting(name))
        effective, by_checkpoint = dict[str, Any](), set[str]()
        for name in names | dict.fromkeys(name for name in options if name in FIELDS):
            if name in options:
                effective[name] = options[name]
            elif called.get(name) is not None and not _alike(called[name], own.get(name)):
                effective[name] = called[name]
            else:
                effective[name] = own.get(name)
                by_checkpoint.add(name)
        return cls(effective, frozenset(by_checkpoint))


def admit(asked: Asked, vocab_size: int, say: bool = True) -> None:
    """Refuse what is not served, and say in one line what is left out.

    Raises:
        InputError: names the settings, and where they come from.
    """
    known = vars(GenerationConfig())
    sampled = asked.effective.get("do_sample") is True
    refused, left_out = list[str](), list[str]()
    for name, value in asked.effective.items():
        if name not in FIELDS and name not in known:
            continue  # an entry of the checkpoint's own, which transformers does not know either
        if why := problem(name, value, sampled, origin(name, asked)):
            raise InputError(why)
        if asks_for_nothing(name, value) or name in SILENT:
            continue
        verdict = FIELDS[name].verdict if name in FIELDS else "refused"
        if verdict == "refused" or (verdict == "left_out" and name not in asked.by_checkpoint):
            refused.append(name)
        elif verdict in ("unused", "left_out"):
            left_out.append(f"{name}={value!r}{origin(name, asked)}")
    if asked.effective.get("use_cache") is False and "use_cache" in refused:
        raise InputError("use_cache=False: without a cache every token would cost a forward of the whole text")
    if refused:
        raise InputError(f"generate does not serve {_named(refused, asked)} {SPREAD}{_remedy(refused, asked)}")
    for name in WITHIN_VOCABULARY:
        if outside := _outside(asked.effective.get(name), vocab_size):
            raise InputError(f"{name} has {outside[0]}{origin(name, asked)}, outside the vocabulary of {vocab_size}")
    if outside := _outside(asked.effective.get("eos_token_id"), vocab_size):
        left_out.append(f"id {outside[0]} of eos_token_id{origin('eos_token_id', asked)}")
    if say and left_out:
        _say(f"generate leaves out {', '.join(left_out)}: no token depends on it")


def without_left_out(config: GenerationConfig) -> GenerationConfig:
    """A copy that asks for nothing that is left out, so that transformers does not see it."""
    config = copy.deepcopy(config)
    for name in LEFT_OUT:
        setattr(config, name, None)
    return config


def check_mode(settings: GenerationConfig, asked: Asked) -> None:
    """Raise InputError unless transformers would search greedily or sample."""
    mode = settings.get_generation_mode()
    if mode in SERVED_MODES:
        return
    names = [
        name
        for name, field in FIELDS.items()
        if field.verdict == "mode" and not asks_for_nothing(name, asked.effective.get(name))
    ]
    raise InputError(
        f"generate does not serve {mode.value} ({_named(names, asked)}) {SPREAD}; it serves greedy search and "
        f"sampling: num_beams=1{_remedy(names, asked)}"
    )


def check_processors(
    generation: GenerationMixin, settings: GenerationConfig, input_ids: Tensor, tokenizer: Any
) -> None:
    """Make what transformers makes of ``settings`` in front of its loop, so that what it cannot use is refused here.

    Args:
        settings: after ``GenerationMixin._prepare_special_tokens``.
        input_ids: [B, C], on the CPU.
        tokenizer: of stop strings; None: the call gives none.

    Raises:
        InputError: with transformers' own words.
    """
    try:
        processors = generation._get_logits_processor(
            generation_config=settings, input_ids_seq_length=input_ids.shape[1], encoder_input_ids=input_ids,
            device="cpu", model_kwargs={},
        )  # fmt: skip
        # These meet the vocabulary in their first call alone.
        logits_1V = torch.zeros(1, generation.config.get_text_config().vocab_size)
        for processor in processors:
            if isinstance(processor, SequenceBiasLogitsProcessor):
                processor(input_ids[:1], logits_1V)
        GenerationMixin._get_stopping_criteria(generation, settings, StoppingCriteriaList(), tokenizer=tokenizer)
    except Exception as error:  # settings of a wrong type end in errors of any kind
        raise InputError(f"transformers refuses the options of generate: {in_one_line(error)}") from None


@cache
def _say(text: str) -> None:
    """Once in a process: the settings of a checkpoint come again in every call."""
    log.warning("%s", text)


def _is_setting(name: str) -> bool:
    return name in FIELDS or not name.startswith("_")


def _alike(one: Any, other: Any) -> bool:
    return type(one) is type(other) and not isinstance(one, Tensor) and one == other


def _outside(ids: Any, vocab_size: int) -> list[int]:
    found = ids.flatten().tolist() if isinstance(ids, Tensor) else ids
    found = [] if found is None else found if isinstance(found, list | tuple) else [found]
    return [id for id in found if not 0 <= id < vocab_size]


def origin(name: str, asked: Asked) -> str:
    """What errors say behind a setting that the checkpoint alone asks for."""
    return f" of the checkpoint's {GENERATION_CONFIG_NAME}" if name in asked.by_checkpoint else ""


def _named(names: list[str], asked: Asked) -> str:
    return ", ".join(f"{name}={_short(asked.effective[name])}{origin(name, asked)}" for name in names)


def _remedy(names: list[str], asked: Asked) -> str:
    """How to have it otherwise than the checkpoint says."""
    own = [name for name in names if name in asked.by_checkpoint]
    values = [f"{name}={next(iter(FIELDS[name].neutral), None)}" for name in own if name in FIELDS]
    return f"; give {', '.join(values)} to generate, or take it out of that file" if values else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
