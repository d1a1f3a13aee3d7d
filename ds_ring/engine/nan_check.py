"""NaN and infinity: found before a result leaves the engine, and located by layer and rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ds_ring.engine.batch import Batch
from ds_ring.engine.model_runner import ModelRunner, Shard
from ds_ring.errors import NumericsError
from ds_ring.hf.decoder import Decoder

T = TypeVar("T")


def all_finite(*tensors: Tensor | None) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors if t is not None)


@contextmanager
def bad_layers(decoder: Decoder) -> Iterator[list[int]]:
    """Inside the block, collects the numbers (within ``Decoder.layers``) of layers whose output is not finite."""
    found: list[int] = []

    def watch(number: int) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if not all_finite(out if isinstance(out, Tensor) else out[0]):
                found.append(number)

        return hook

    handles = [layer.register_forward_hook(watch(i)) for i, layer in enumerate(decoder.layers)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def describe(bad: list[int | None], num_layers: int) -> str:
    """A sentence made of every rank's first bad layer (None: all its layers are finite)."""
    first = min((layer for layer in bad if layer is not None), default=None)
    if first is None:
        return f"the model gave NaN or infinity behind its last layer ({num_layers} layers are finite)"
    ranks = ", ".join(str(rank) for rank, layer in enumerate(bad) if layer == first)
    return (
        f"layer {first} of {num_layers} gave NaN or infinity, on rank {ranks}; check the weights, or, if "
        f"activations overflow fp16, take dtype bf16 or fp32"
    )


def checked_run(runner: ModelRunner, micro_batches: list[Batch], keep: list[Tensor], want_hidden: bool) -> list[Shard]:
    """``runner.run_micro_batches``, refusing results that are not finite."""
    return checked(
        runner,
        lambda: runner.run_micro_batches(micro_batches, keep, want_hidden),
        lambda shard: all_finite(shard.logits_BkV, shard.hidden_BTd),
    )


def checked(runner: ModelRunner, run: Callable[[], list[T]], fine: Callable[[T], bool]) -> list[T]:
    """What ``run`` gives, refusing results that are not finite; all ranks raise together and name where it began.

    Raises:
        NumericsError: some result is not ``fine`` on some rank.
    """
    results = run()
    if all(runner.mesh["world"].all_gather_objects(all(map(fine, results)))):
        return results
    raise located(runner, run)


def located(runner: ModelRunner, run: Callable[[], object]) -> NumericsError:
    """What to raise where ``run`` gave NaN or infinity: every rank runs it once more, to name where it began."""
    with bad_layers(runner.decoder) as found:
        run()
    own = runner.layers[min(found)] if found else None
    return NumericsError(describe(runner.mesh["world"].all_gather_objects(own), runner.dims.num_layers))
