"""Check transformers' causal LMs: each in small, with random weights, sharded against unsharded."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.models import trials
from benchmarks.models.tiny_models import SIZES, architectures, ropes_of, tiny_config, tiny_model
from ds_ring import api
from ds_ring.config import RunConfig
from ds_ring.engine.connect import connect
from ds_ring.errors import InputError, UserError
from ds_ring.process.watchdog import process_watchdog
from ds_ring.transport.base import Transport
from ds_ring.utils.model_config import read_config

TOLERANCE = 1e-4
"""On the worst token's relative error, fp32. A token at a wrong position gives errors near 1."""
WITHOUT_CACHE = "equal to transformers' own without its cache"
"""Where transformers' generation with its cache is at odds with its forward."""
TIE = 1e-3
"""If the two best logits are nearer than this, sums in another order may prefer either."""


def check_names(names: list[str], new_tokens: int) -> None:
    """Raise InputError for an unknown name, or more tokens than the small models have positions for."""
    room = SIZES["max_position_embeddings"] - trials.LENGTH
    if not 0 < new_tokens <= room:
        raise InputError(f"new_tokens={new_tokens} must be from 1 to {room}")
    if unknown := [name for name in names if name not in architectures()]:
        raise InputError(f"transformers has no causal LM of type {', '.join(unknown)}")


def rows(config: RunConfig, names: list[str], new_tokens: int, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Check every model type of ``names``, or all if there are none; rotary ones also with the kinds of RoPE that
    depend on the length. Collective.

    Yields:
        {model_type, class, rope, outcome, detail, max_rel_error, same_tokens} of each.
    """
    everyone = connect(config)["world"]
    for name in names or architectures():
        for kind in ("", *ropes_of(name)):
            row = _row(name, kind, config, trials.FEW if kind else new_tokens, everyone)
            say(f"{name} {kind}: {row['outcome']} {row['detail']}")
            yield row
            if WITHOUT_CACHE in row["detail"]:
                break  # nothing to hold a longer text's cached keys against


def _row(model_type: str, kind: str, config: RunConfig, new_tokens: int, everyone: Transport) -> dict[str, Any]:
    row: dict[str, Any] = {"model_type": model_type, "class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]}
    row |= {"rope": kind} if kind else {}
    with _shared_folder(everyone) as folder:
        try:
            if everyone.rank == 0:
                tiny_model(tiny_config(model_type, kind)).save_pretrained(folder)
            problem = None
        except Exception as error:  # configs and models raise errors of any kind for sizes that they cannot have
            problem = _first_line(error)
        # So far only rank 0 knows of a problem.
        with process_watchdog.watch("waiting for rank 0's model"):
            problem = everyone.all_gather_objects(problem)[0]
        if problem is None:
            try:
                want = trials.of_unsharded(_load(folder), new_tokens)
            except Exception as error:
                problem = _first_line(error)
        if problem is not None:
            return {**row, "outcome": "not tried", "detail": problem}
        try:
            got = trials.of_sharded(api.from_pretrained(folder, config=_with_room(config, folder)), new_tokens)
        except UserError as error:
            return {**row, "outcome": "refused", "detail": str(error)}
        except Exception as error:
            return {**row, "outcome": "failed", "detail": _first_line(error)}
        details = [_differing(name, got, want) for name in want.generated]
        if any(details):
            uncached = trials.of_unsharded(_load(folder), new_tokens, use_cache=False)
    errors = [_worst(*pair) for pair in zip(got.logits, want.logits, strict=True)]
    errors += [_relative(*pair) for pair in zip(got.scores, want.scores, strict=True)]
    works = max(errors) < TOLERANCE
    for name, detail in zip(want.generated, tuple(details), strict=True):
        if detail and not _differing(name, got, uncached):
            details.append(WITHOUT_CACHE)
        elif detail:
            at = _same_tokens(name, got, want)
            works = works and want.generated[name].margins[at] < TIE
    return {
        **row, "outcome": "works" if works else "differs", "detail": "; ".join(dict.fromkeys(filter(None, details))),
        "max_rel_error": max(errors), "same_tokens": _same_tokens("", got, want),
    }  # fmt: skip


def _with_room(config: RunConfig, folder: Path) -> RunConfig:
    """``config`` with enough sequences in a batch for all lengths of the model."""
    return RunConfig.load(config, batch_size=len(trials.lengths(read_config(folder))))


def _load(folder: Path) -> PreTrainedModel:
    # Eager, because older releases silently drop soft-capping under SDPA.
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def _same_tokens(name: str, got: trials.Answers, want: trials.Answers) -> int:
    """How many new tokens of a generation are the same before the first that differs."""
    own, other = got.generated[name].tokens, want.generated[name].tokens
    given = other.shape[1] - len(want.generated[name].margins)
    return int((own == other).long().cumprod(1).sum()) - given


def _differing(name: str, got: trials.Answers, want: trials.Answers) -> str:
    """Which token of a generation differs, and how near the two best logits are there; empty where none does."""
    margins, same = want.generated[name].margins, _same_tokens(name, got, want)
    if same == len(margins):
        return ""
    where = f" {name}" if name else ""
    return f"token {same + 1}{where} differs, where the best two logits are {margins[same]:.1e} apart"


def _worst(got: Tensor, want: Tensor) -> float:
    """The relative error of the worst token."""
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@contextmanager
def _shared_folder(everyone: Transport) -> Iterator[Path]:
    """A folder that rank 0 makes, and removes when all ranks have left the block. Ranks must share a file system."""
    with tempfile.TemporaryDirectory() as own:
        with process_watchdog.watch("waiting for rank 0's folder"):
            folder = everyone.all_gather_objects(own)[0]
        yield Path(folder)
        with process_watchdog.watch("waiting for all ranks to be done with a folder"):
            everyone.barrier()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]
