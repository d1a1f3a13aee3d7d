"""The last decoder layer for each row's last token only: all that a next token needs of it.

The layer runs twice. On all tokens, up to its attention, for their keys and values; then whole, on the last tokens,
whose queries attend to those. Both times it is the layer's own code, so nothing here knows an architecture, and the
result is exact. (The projection of all tokens' queries, where it is a module of its own, is left out as well.)
"""

# Shapes: B rows, T tokens on this rank.
from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import Cache

from ds_ring.attention.last_token import everyones, last_token_attention
from ds_ring.attention.spec import AttentionSpec
from ds_ring.errors import UnsupportedModelError
from ds_ring.hf.attention_context import AttentionContext
from ds_ring.hf.decoder import Decoder
from ds_ring.hf.linear import Linear
from ds_ring.transport.base import Transport


@dataclass(frozen=True)
class LastTokens:
    """Where the last token of each row is.

    Attributes:
        lengths: tokens of each row.
        held: for each rank of ``transport`` the positions, ascending, of the tokens it holds.
        transport: the ranks that hold a sequence together.
    """

    lengths: tuple[int, ...]
    held: list[list[int]]
    transport: Transport

    def seen(self, window: int | None) -> list[range]:
        """For each row, which of this rank's tokens its last token sees."""
        own = self.held[self.transport.rank]
        starts = [0 if window is None else n - window for n in self.lengths]
        return [
            range(bisect_left(own, start), bisect_left(own, n)) for start, n in zip(starts, self.lengths, strict=True)
        ]

    def pick(self, x_BT: Tensor) -> Tensor:
        """[B, 1, *], on every rank, of values [B or 1, T, *] of this rank's tokens."""
        places = [self._buffers(n - 1) for n in self.lengths]
        own = [at if rank == self.transport.rank else 0 for rank, at in places]  # others' are not looked at
        rows = x_BT.expand(len(places), *x_BT.shape[1:])
        picked_B1 = torch.cat([rows[row : row + 1, at : at + 1] for row, at in enumerate(own)])
        if self.transport.size == 1:
            return picked_B1
        everyones_NB1 = everyones(picked_B1, self.transport)
        return torch.cat([everyones_NB1[rank, row : row + 1] for row, (rank, _) in enumerate(places)])

    def _buffers(self, position: int) -> tuple[int, int]:
        """(rank, place among its tokens)."""
        for rank, positions in enumerate(self.held):
            at = bisect_left(positions, position)
            if at < len(positions) and positions[at] == position:
                return rank, at
        raise AssertionError(f"no rank holds position {position}")


class _Captured(BaseException):
    """Ends the first run behind its attention's inputs; no error, so nothing on the way may take it for one."""


@contextmanager
def last_tokens_only(decoder: Decoder, context: AttentionContext, tokens: LastTokens) -> Iterator[None]:
    """Inside the block the model's last layer computes its output for each row's last token, and gives it at all l
    places of the row, as a view: models reshape what comes behind their layers by the shape of what went in."""
    layer = decoder.layers[-1]
    own: list[Callable[..., Any]] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        return _run(layer, context, tokens, own[0], args, kwargs)

    with _forward_replaced(layer, forward) as previous:
        own.append(previous)
        yield


def _run(
    layer: nn.Module, context: AttentionContext, tokens: LastTokens, forward: Any, args: Any, kwargs: dict[str, Any]
) -> Any:
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    count, length = hidden.shape[:2]
    keys_values: list[Tensor] = []

    def capture(q: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, spec: AttentionSpec, sinks: Tensor | None) -> Tensor:
        keys_values.extend((k_BTKD, v_BTKD))
        raise _Captured

    def answer(q_B1HD: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, sinks_H: Tensor | None) -> Tensor:
        return last_token_attention(
            q_B1HD, *keys_values, seen=tokens.seen(spec.window), spec=spec, transport=tokens.transport, sinks_H=sinks_H
        )

    def of_last_tokens(value: Any) -> Any:
        if isinstance(value, Cache):
            return None  # the first run has put everything in
        per_token = isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == length
        return tokens.pick(value) if per_token and value.shape[0] in (1, count) else value

    try:
        with context.attending_by(capture), _queries_left_out(layer):
            forward(*args, **kwargs)
    except _Captured:
        pass
    if not keys_values:
        raise UnsupportedModelError(f"{type(layer).__name__} ran without attention: prefill_only cannot shorten it")
    with context.attending_by(answer):
        out = forward(*tree_map(of_last_tokens, args), **tree_map(of_last_tokens, kwargs))
    if isinstance(out, Tensor):
        return out.expand(-1, length, -1)
    return out[0].expand(-1, length, -1), *out[1:]


@contextmanager
def _queries_left_out(layer: nn.Module) -> Iterator[None]:
    """Inside the block a query projection that is a module of its own gives memory as it is found."""
    modules = [module for name, module in layer.named_modules() if name.endswith(".q_proj")]
    found = [p for module in modules if (p := Linear.of(module)) is not None and p.split != "in"]
    with ExitStack() as stack:
        for product in found:
            width = product.weight_NW.shape[1]
            stack.enter_context(_forward_replaced(product.module, _unwritten(width)))
        yield


def _unwritten(width: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.new_empty(*x.shape[:-1], width)


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Inside the block ``module`` runs ``forward``; yields what it ran before."""
    previous = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield previous or type(module).forward.__get__(module)
    finally:
        del vars(module)["forward"]
        if previous is not None:
            vars(module)["forward"] = previous
