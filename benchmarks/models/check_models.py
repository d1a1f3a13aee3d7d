"""Check transformers' causal LMs: each in small, with random weights, sharded against unsharded."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.models.tiny_models import SEED, SIZES, architectures, tiny_config, tiny_model
from ds_ring import api
from ds_ring.config import RunConfig
from ds_ring.engine.connect import connect
from ds_ring.errors import InputError, UserError
from ds_ring.process.watchdog import process_watchdog
from ds_ring.transport.base import Transport

LENGTH = 75
TOLERANCE = 1e-4
"""On the worst token's relative error, fp32. A token at a wrong position gives errors near 1."""
TIE = 1e-3
"""If the two best logits are nearer than this, sums in another order may prefer either."""


def check(config: RunConfig, names: list[str], new_tokens: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Check every model type of ``names``, or all if there are none. Collective.

    Returns:
        ``{"layout", …, "rows": [{model_type, class, outcome, detail, max_rel_error, same_tokens}]}``.

    Raises:
        InputError: an unknown name, or more tokens than the small models have positions for.
    """
    room = SIZES["max_position_embeddings"] - LENGTH
    if not 0 < new_tokens <= room:
        raise InputError(f"new_tokens={new_tokens} must be from 1 to {room}")
    known = architectures()
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"transformers has no causal LM of type {', '.join(unknown)}")
    everyone = connect(config)["world"]
    rows = []
    for name in names or known:
        rows.append(_row(name, config, new_tokens, everyone))
        say(f"{name}: {rows[-1]['outcome']} {rows[-1]['detail']}")
    return {"layout": config.topology.label(), "length": LENGTH, "new_tokens": new_tokens, "rows": rows}


def _row(model_type: str, config: RunConfig, new_tokens: int, everyone: Transport) -> dict[str, Any]:
    row: dict[str, Any] = {"model_type": model_type, "class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]}
    with _shared_folder(everyone) as folder:
        try:
            if everyone.rank == 0:
                tiny_model(tiny_config(model_type)).save_pretrained(folder)
            problem = None
        except Exception as error:  # configs and models raise errors of any kind for sizes that they cannot have
            problem = _first_line(error)
        # So far only rank 0 knows of a problem.
        with process_watchdog.watch("waiting for rank 0's model"):
            problem = everyone.all_gather_objects(problem)[0]
        if problem is None:
            try:
                want, tokens, margins = _unsharded(folder, new_tokens)
            except Exception as error:
                problem = _first_line(error)
        if problem is not None:
            return {**row, "outcome": "not tried", "detail": problem}
        try:
            got, new = _sharded(folder, config, new_tokens)
        except UserError as error:
            return {**row, "outcome": "refused", "detail": str(error)}
        except Exception as error:
            return {**row, "outcome": "failed", "detail": _first_line(error)}
        uncached = tokens if torch.equal(new, tokens) else _unsharded(folder, new_tokens, use_cache=False)[1]
    difference = float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())
    same = int((new == tokens).long().cumprod(1).sum()) - LENGTH
    detail = ""
    if same < new_tokens:
        detail = f"token {same + 1} differs, where the best two logits are {margins[same]:.1e} apart"
        if torch.equal(new, uncached):
            detail += "; all equal transformers' own without its cache"
    works = difference < TOLERANCE and (torch.equal(new, uncached) or margins[same] < TIE)
    return {
        **row, "outcome": "works" if works else "differs", "detail": detail, "max_rel_error": difference,
        "same_tokens": same,
    }  # fmt: skip


def _prompt() -> Tensor:
    return torch.randint(3, SIZES["vocab_size"], (1, LENGTH), generator=torch.Generator().manual_seed(SEED))


def _options(new_tokens: int) -> dict[str, Any]:
    return {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def _unsharded(folder: Path, new_tokens: int, use_cache: bool = True) -> tuple[Tensor, Tensor, list[float]]:
    """(logits, greedy tokens, the distance of each step's two best logits), on the CPU."""
    # Eager, because older releases silently drop soft-capping under SDPA.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = _prompt()
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), use_cache=use_cache, return_dict_in_generate=True,
            output_logits=True, **_options(new_tokens),
        )  # fmt: skip
    best_two = torch.cat(found.logits).topk(2).values
    return logits, found.sequences, (best_two[:, 0] - best_two[:, 1]).tolist()


def _sharded(folder: Path, config: RunConfig, new_tokens: int) -> tuple[Tensor, Tensor]:
    engine, ids = api.from_pretrained(folder, config=config), _prompt()
    logits = engine(ids).logits
    assert logits is not None
    tokens = engine.generate(ids, torch.ones_like(ids), **_options(new_tokens))
    assert isinstance(tokens, Tensor)
    return logits.cpu(), tokens.cpu()


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
