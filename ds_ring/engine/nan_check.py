"""NaN and infinity: found before a result leaves the engine, and located by layer and rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ds_ring.engine.batch import Batch
from ds_ring.engine.model_runner import ModelRunner, Shard
from ds_ring.errors import NumericsError
from ds_ring.hf.decoder import Decoder

T = TypeVar("T")

CHECK = "check the weights, or, if activations overflow fp16, take dtype bf16 or fp32"


def all_finite(*tensors: Tensor | None) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors if t is not None)


@contextmanager
def bad_parts(decoder: Decoder, layers: range) -> Iterator[list[int]]:
    """Inside the block, collects what gives NaN or infinity: numbers of ``layers``, ``_norm`` or ``_head``."""
    found: list[int] = []

    def watch(number: int) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if not all_finite(out if isinstance(out, Tensor) else out[0]):
                found.append(number)

        return hook

    watched: dict[int, nn.Module] = dict(zip(layers, decoder.layers, strict=True))
    watched[_NORM] = decoder.module
    if (head := decoder.model.get_output_embeddings()) is not None:
        watched[_HEAD] = head
    handles = [module.register_forward_hook(watch(number)) for number, module in watched.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


_NORM, _HEAD = 1 << 30, 1 << 31
"""In place of a layer's number: what comes behind all layers."""


def describe(bad: Sequence[int | None], num_layers: int) -> str:
    """A sentence made of what is bad first on every rank (None: nothing)."""
    first = min((part for part in bad if part is not None), default=None)
    if first is None:
        return f"the model gave NaN or infinity, though none of its {num_layers} layers, nor its head, when run again"
    ranks = ", ".join(str(rank) for rank, part in enumerate(bad) if part == first)
    behind = f", behind {num_layers} layers that are finite"
    what = {_NORM: "the last norm", _HEAD: "the head"}.get(first, f"layer {first} of {num_layers}")
    return f"{what} gave NaN or infinity, on rank {ranks}{behind if first >= _NORM else ''}; {CHECK}"


def checked_run(runner: ModelRunner, micro_batches: list[Batch], keep: list[Tensor], want_hidden: bool) -> list[Shard]:
    """``runner.run_micro_batches``, refusing results that are not finite."""
    return checked(runner, lambda: runner.run_micro_batches(micro_batches, keep, want_hidden), finite_shard)


def finite_shard(shard: Shard) -> bool:
    return all_finite(shard.logits_BkV, shard.hidden_BTd)


def checked(runner: ModelRunner, run: Callable[[], list[T]], fine: Callable[[T], bool]) -> list[T]:
    """What ``run`` gives, refusing results that are not finite; all ranks raise together and name where it began.

    Raises:
        NumericsError: some result is not ``fine`` on some rank.
    """
    results = run()
    require(runner, all(map(fine, results)), run)
    return results


def require(runner: ModelRunner, fine: bool, run: Callable[[], object]) -> None:
    """Raise NumericsError on every rank where what ``run`` gave is not ``fine`` on one of them. Collective."""
    if not all(runner.mesh["world"].all_gather_objects(fine)):
        raise located(runner, run)


def located(runner: ModelRunner, run: Callable[[], object]) -> NumericsError:
    """What to raise where ``run`` gave NaN or infinity: every rank runs it once more, to name where it began."""
    with bad_parts(runner.decoder, runner.layers) as found:
        run()
    return NumericsError(
        describe(runner.mesh["world"].all_gather_objects(min(found, default=None)), runner.dims.num_layers)
    )
